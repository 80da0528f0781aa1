"""How good synthetic images are: classifier-FID and classifier-IS (ALGORITHM 4.1), through torchmetrics.

Both are known with Inception v3 (Heusel et al. 2017; Salimans et al. 2016). Here a classifier of the experiment's own
stands in its place: the Fréchet distance is taken between its features, the score is of its logits. Such values
compare within one classifier only, so a distance always comes beside its floor, that between two sets of real images
of the same size.
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
from ..data.transforms import normalise
from ..models.state_dict import freeze

#: The inception score is the mean over so many parts of the images (Salimans et al. 2016) of so many a class at least:
#: in smaller ones it is too low by much, even of real images.
SPLITS, SPLIT_PER_CLASS = 10, 20
FOLDS = 5
_CHUNK = 500

#: What torch-fidelity calls the weights that published Inception-FIDs were taken with.
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class Network(nn.Module):
    """uint8 images [B, C, H, W] to a classifier's features, or with ``logits`` to its logits: float64 [B, d]."""

    def __init__(self, classifier: nn.Module, facts: DataFacts, *, logits: bool = False) -> None:
        super().__init__()
        self.classifier, self.facts, self.logits = freeze(classifier), facts, logits
        self.num_features: int = facts.num_classes if logits else classifier.feature_dim  # torchmetrics asks for it

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        seen = normalise(images, self.facts.mean, self.facts.std)
        return (self.classifier(seen) if self.logits else self.classifier.features(seen)).double()


class _LogProbabilities(nn.Module):
    """Of a network's logits; none so small that its exponential is 0, for torchmetrics has 0 log 0 = NaN."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).double().log_softmax(1).clamp(min=-700)


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
    return max(0.0, float(metric.compute()))  # equal sets: rounding may end below 0


def inception_score(network: Network, images: np.ndarray, seed: int, device: str = "cpu") -> tuple[float, float | None]:
    """(mean, sd) over ten parts of exp E_x KL(p(y|x) || p(y)), each within [1, C], of uint8 images [N, C, H, W].

    ``network`` maps images to logits [B, C]. ``seed``: which image falls into which part. Of few images there are fewer
    parts; of one there is no sd.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():  # it keeps all logits, which are few here
        warnings.filterwarnings("ignore", "Metric `InceptionScore`", UserWarning)
        splits = max(1, min(SPLITS, len(images) // (SPLIT_PER_CLASS * network.num_features)))
        metric = InceptionScore(_LogProbabilities(network), splits=splits).to(device)
    for part in _chunks(images):
        metric.update(part.to(device))
    with seeded(seed, "quality", "inception-score"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "std\\(\\): degrees of freedom", UserWarning)
        mean, sd = metric.compute()
    return float(mean), float(sd) if splits > 1 else None


@torch.no_grad()
def predicted(network: nn.Module, images: np.ndarray, device: str = "cpu") -> np.ndarray:
    """The class that ``network`` (to logits) names in each of uint8 ``images`` [N, C, H, W]: int64 [N]."""
    return np.concatenate([network(part.to(device)).argmax(1).cpu().numpy() for part in _chunks(images)])


def class_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """float64 [C]: share of each class in ``labels`` [N]."""
    return np.bincount(labels, minlength=num_classes) / len(labels)


def coverage(shares: np.ndarray) -> float:
    """Share of the classes that get 1 % of the images, or a tenth of an equal share where there are more than ten."""
    return float((shares >= min(0.01, 0.1 / len(shares))).mean())


def domain_auc(real: np.ndarray, synthetic: np.ndarray, seed: int) -> float:
    """How well a linear classifier tells ``synthetic`` [m, d] from ``real`` [n, d]: 0.5 not at all, 1 always.

    Logistic regression on standardised features; the mean over five stratified folds of the AUC on the fold that was
    left out. 0.5 where either has fewer vectors than there are folds.
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
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    with threadpool_limits(1), warnings.catch_warnings():  # one thread, as for the prototypes: the last bit
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(judge, vectors, truth, cv=StratifiedKFold(FOLDS), scoring="roc_auc").mean())


def inception_weights() -> Path:
    """The file of Inception v3's weights; ``RequestError`` where it or torch-fidelity is missing. Fetches nothing."""
    from importlib.util import find_spec

    place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if find_spec("torch_fidelity") is None:
        raise RequestError("--inception: it needs the package torch-fidelity, which is not installed; or leave it out")
    if not place.is_file():
        raise RequestError(
            f"--inception: there is no {place}, and nothing is downloaded unasked; put torch-fidelity's release file "
            "there, or leave it out"
        )
    return place


def _chunks(images: np.ndarray) -> list[Tensor]:
    """Pieces that are copied one at a time: arrays from elsewhere may be read-only."""
    return [torch.tensor(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
