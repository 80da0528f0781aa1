"""Quality of synthetic images: classifier-FID, classifier-IS and domain AUC (docs/algorithm.md 4.1, 4.2).

FID and IS are defined with Inception v3 (Heusel et al. 2017; Salimans et al. 2016). Here a classifier of the experiment
replaces it: the Fréchet distance uses its features, the score its logits. Values are comparable for one classifier
only, so a distance is always reported with its floor, the distance between two sets of real images of equal size.
torchmetrics computes both.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import RequestError
from ..core.seeding import numpy_stream, seeded
from ..core.types import DataFacts
from ..data.transforms import to_input
from ..models.classifiers import Classifier
from ..models.state_dict import freeze

#: Largest number of parts for the inception score (Salimans et al. 2016), and fewest images per class in a part: the
#: score of smaller parts is much too low, even for real images.
SPLITS, SPLIT_PER_CLASS = 10, 20
FOLDS = 5  # of the cross-validation of `domain_auc`
_CHUNK = 500

#: File name in torch-fidelity of the weights that published FIDs use.
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class Network(nn.Module):
    """Maps uint8 images to a classifier's features, or with ``logits`` to its logits: float64 [B, d]."""

    def __init__(self, classifier: Classifier, facts: DataFacts, *, logits: bool = False) -> None:
        super().__init__()
        self.classifier, self.facts, self.logits = freeze(classifier), facts, logits
        self.num_features: int = facts.num_classes if logits else classifier.feature_dim  # read by torchmetrics

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        seen = to_input(images, self.facts)
        outputs: Tensor = self.classifier(seen) if self.logits else self.classifier.features(seen)
        return outputs.double()


def frechet_distance(network: nn.Module | Path, first: np.ndarray, second: np.ndarray, device: str = "cpu") -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2}) of the features of two sets of uint8 images [N, C, H, W]; >= 0.

    ``network`` maps such images to features, or is the file of Inception v3's weights (``inception_weights``).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if isinstance(network, Path):
        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(network))
        first, second = (np.broadcast_to(x, (len(x), 3, *x.shape[2:])) for x in (first, second))
    else:
        metric = FrechetInceptionDistance(network)
    metric.to(device)
    for images, real in ((first, True), (second, False)):
        for part in _chunks(images):
            metric.update(part.to(device), real=real)
    return max(0.0, float(metric.compute()))  # rounding can give less than 0 for equal sets


def inception_score(network: Network, images: np.ndarray, seed: int, device: str = "cpu") -> tuple[float, float | None]:
    """Return mean and sd of exp E_x KL(p(y|x) || p(y)), in [1, C], over up to ten parts of uint8 ``images``.

    ``images`` [N, channels, H, W]; ``network`` maps them to logits [B, C]. ``seed`` sets the random parts. Few images
    give fewer parts; the sd is None for one part.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():  # warns that it keeps all logits, which are few here
        warnings.filterwarnings("ignore", "Metric `InceptionScore`", UserWarning)
        splits = max(1, min(SPLITS, len(images) // (SPLIT_PER_CLASS * network.num_features)))
        # log probabilities of at least -700, so that torchmetrics computes no 0 log 0 = NaN
        bounded = nn.Sequential(network, nn.LogSoftmax(1), nn.Hardtanh(-700, 0))
        metric = InceptionScore(bounded, splits=splits).to(device)
    for part in _chunks(images):
        metric.update(part.to(device))
    with seeded(seed, "quality", "inception-score"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "std\\(\\): degrees of freedom", UserWarning)
        mean, sd = metric.compute()
    return float(mean), float(sd) if splits > 1 else None


@torch.no_grad()
def predicted(network: nn.Module, images: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Return the classes int64 [N] that ``network`` predicts for uint8 ``images`` [N, channels, H, W]."""
    return np.concatenate([network(part.to(device)).argmax(1).cpu().numpy() for part in _chunks(images)])


def class_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float64 [C]: the share of each class in ``labels`` [N]."""
    return np.bincount(labels, minlength=num_classes) / len(labels)


def coverage(shares: np.ndarray) -> float:
    """Return the share of classes with at least 1 % of the images (a tenth of an equal share for more than ten)."""
    return float((shares >= min(0.01, 0.1 / len(shares))).mean())


def domain_auc(real: np.ndarray, synthetic: np.ndarray, seed: int) -> float:
    """Return the AUC in [0, 1] of a linear classifier of ``synthetic`` [m, d] against ``real`` [n, d]; 0.5 is chance.

    Uses logistic regression on standardised features; the mean over five stratified folds of the AUC on the fold left
    out. 0.5 if either set has fewer vectors than folds.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if min(len(real), len(synthetic)) < FOLDS:
        return 0.5
    truth = np.repeat([0, 1], [len(real), len(synthetic)])
    order = numpy_stream(seed, "quality", "domain").permutation(len(truth))
    vectors, truth = np.concatenate([real, synthetic])[order], truth[order]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    with threadpool_limits(1), warnings.catch_warnings():  # one thread: same last bit on all hosts
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, vectors, truth, cv=StratifiedKFold(FOLDS), scoring="roc_auc").mean())


def inception_weights() -> Path:
    """Return the file of Inception v3's weights; ``RequestError`` if it or torch-fidelity is missing. No download."""
    from importlib.util import find_spec

    place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if find_spec("torch_fidelity") is None:
        raise RequestError("--inception: it needs torch-fidelity; pip install 'mosaic-ray[fid]', or leave it out")
    if not place.is_file():
        raise RequestError(
            f"--inception: there is no {place}, and nothing is downloaded unasked; put torch-fidelity's release file "
            "there, or leave it out"
        )
    return place


def _chunks(images: np.ndarray) -> list[Tensor]:
    """Split images into tensors, by copy: the arrays may be read-only."""
    return [torch.tensor(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
