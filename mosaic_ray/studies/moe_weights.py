"""`mosaic experiment moe-weights`: estimate the experts' weights from synthetic images alone.

The class experts weigh client k by W_{k,c} = n_{k,c} / sum_k n_{k,c}, for which clients send their label counts. Here
only their sizes n_k are known: W_hat_{k,c} is proportional to n_k P_k(c), with P_k(c) the share of client k's synthetic
images in which client k's own model sees class c. There are three baselines: ``noise``, the same with images of
random pixels, since a model that knows few classes predicts them for any image; ``sizes``, n_k / n for every class
(FedAvg's weights); and ``uniform``, 1 / K.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.schema import ExperimentConfig
from ..core.seeding import numpy_stream
from ..core.types import Weights
from .harness import CHUNK, Row, Study, StudyContext, generated, measured, uploads

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..federated.client import ClientContext
    from ..storage.store import StageResult

BASE: dict[str, Any] = {"algorithm": "distilled"}
NUM_IMAGES = 2000


def estimate(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return W_hat float64 [K, C], columns that sum to 1, from P_k(c) ``shares`` [K, C] and n_k ``sizes`` [K].

    The column of a class that no generator shows is n_k / n.
    """
    mass = shares * sizes[:, None]
    mass[:, mass.sum(0) == 0] = sizes[:, None]
    return mass / mass.sum(0)


def total_variation(true: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Return float64 [C] in [0, 1]: half the summed absolute difference of two columns of weights [K, C]."""
    return np.abs(true - guess).sum(0) / 2


def rank_correlations(true: np.ndarray, guess: np.ndarray) -> list[float | None]:
    """Return Spearman's correlation over clients for each class; None where either column is constant."""
    from scipy.stats import spearmanr

    return [
        None if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)
        for a, b in zip(true.T, guess.T, strict=True)
    ]


def compared(name: str, true: np.ndarray, guess: np.ndarray) -> Row:
    """Return the metrics of one estimate; ``owner``: share of classes for which it finds the largest owner."""
    distances, ranks = total_variation(true, guess), rank_correlations(true, guess)
    known = [value for value in ranks if value is not None]
    one = np.ptp(guess, 0) > 0
    return {
        "weights": name,
        "total_variation": float(distances.mean()), "worst": float(distances.max()),
        "rank_correlation": float(np.mean(known)) if known else None,
        "owner": float((one & (guess.argmax(0) == true.argmax(0))).mean()) if one.any() else None,
        "class_distance": distances.tolist(), "class_rank": ranks,
    }  # fmt: skip


def measure(context: StudyContext, config: ExperimentConfig) -> StageResult:
    """Compute the clients' models and generators, and estimate the weights from their images."""
    from ..distillation.experts import expert_weights

    with context.run(config) as run:
        shards, warmup, generators = uploads(run)

        def compute() -> tuple[list[Row], dict[str, np.ndarray]]:
            owned = np.flatnonzero(shards.counts.sum(0))  # a class that nobody holds has no weights
            shares, noise = np.zeros((2, *shards.counts.shape))
            for client_id, made in zip(generators.clients, generators.results, strict=True):
                shares[client_id], noise[client_id] = run.on_server(
                    client_shares, client_id, warmup.client(client_id), made.load("generator")
                )
            true, sizes = expert_weights(shards.counts)[:, owned], shards.sizes.astype(np.float64)
            alike = np.ones(true.shape)
            guesses = {
                "synthetic": estimate(shares[:, owned], sizes),
                "noise": estimate(noise[:, owned], sizes),
                "sizes": estimate(alike, sizes),
                "uniform": alike / len(sizes),
            }
            rows = [compared(name, true, guess) for name, guess in guesses.items()]
            return rows, {"true": true, "guess": guesses["synthetic"], "classes": owned}

        return measured(run, STUDY, {"images": NUM_IMAGES}, [warmup.key, generators.key], compute)


def client_shares(
    context: ClientContext, client_id: int, weights: Weights, generator: Weights
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares that client k's model predicts on its generator's images, and on noise."""
    from ..distillation.generator_training import classifier_view

    parts = generated(context, generator, NUM_IMAGES, "moe-weights", client_id)
    views = (classifier_view(part, context.config.generator.gan_range, context.facts) for part in parts)
    shares = seen_shares(context, client_id, weights, views)
    return shares, seen_shares(context, client_id, weights, random_images(context, client_id))


def random_images(context: ClientContext, client_id: int) -> Iterator[torch.Tensor]:
    """Yield 2,000 images of uniform independent pixels as classifier inputs."""
    import torch

    from ..data.transforms import to_input

    facts, draws = context.facts, numpy_stream(context.config.seed, "moe-weights/noise", client_id)
    for _ in range(NUM_IMAGES // CHUNK):
        pixels = draws.integers(0, 256, (CHUNK, facts.channels, facts.image_size, facts.image_size), np.uint8)
        yield to_input(torch.tensor(pixels, device=context.device), facts)


def seen_shares(
    context: ClientContext, client_id: int, weights: Weights, views: Iterable[torch.Tensor]
) -> np.ndarray:
    """Return P_k float64 [C]: the share of ``views`` in which client k's model predicts each class."""
    import torch

    from ..distillation.image_quality import class_shares

    model = context.client_classifier(client_id, weights).eval()
    with torch.no_grad():
        labels = torch.cat([model(view).argmax(1) for view in views])
    return class_shares(labels.cpu().numpy(), context.facts.num_classes)


def figure(figure: Figure, rows: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> None:
    """Draw the first seed's true weights and estimate, and the distance of each class over all seeds."""
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for axes, name, title in zip(panels, ("true", "guess"), ("true weights W", "from synthetic images"), strict=False):
        image = axes.imshow(arrays[name], vmin=0, vmax=1, cmap="YlGnBu", aspect="auto", interpolation="nearest")
        axes.set_title(f"{title}, seed {rows[0]['seed']}", size=10)
        classes = arrays["classes"]
        if len(classes) <= 20:
            axes.set_xticks(range(len(classes)), map(str, classes))
        axes.set(xlabel="class", ylabel="client")
    figure.colorbar(image, ax=panels[1])
    for name in dict.fromkeys(row["weights"] for row in rows):
        found = [value for row in rows if row["weights"] == name for value in row["class_distance"]]
        panels[2].plot(np.sort(found), np.linspace(0, 1, len(found)), drawstyle="steps-post", label=name)
    panels[2].set(xlabel="total variation from the true column", ylabel="share of the classes (all seeds)", xlim=(0, 1))
    panels[2].legend(frameon=False)


STUDY = Study(
    "moe-weights", measure, "weights",
    {
        "total_variation": ("total variation", ".3f"), "worst": ("of the worst class", ".3f"),
        "rank_correlation": ("rank correlation", ".2f"), "owner": ("largest owner found", ".0%"),
    },
    figure,
)  # fmt: skip
