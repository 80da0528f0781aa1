"""Train a client's generator: a small GAN on local data, steered by the local classifier (docs/algorithm.md stage G).

With ``generator.family = cgan`` both players also get labels y, drawn with the client's label frequencies
q_c = n_{k,c} / n_k. L_ent + L_div is minus the mutual information of an image and its predicted class. The mutual
information of an image and its label is at least H(q) - L_y, with L_y the classifier's cross-entropy on y (Barber &
Agakov 2003). So L_y with weight lambda_e replaces both terms; lambda_d and div_support are not used. For a batch with
label frequencies q and mean prediction ybar, KL(q || ybar) <= L_y by convexity: as L_y falls, the distribution of
predictions approaches q, without classes that the client lacks.

Measured share of images that an independent classifier assigns to their label (Fashion-MNIST at 16x16, ngf 16, 400
steps, one seed): L_y with weight 1, 0.55; weight 5, 0.40; weight 1 plus 5 KL(q || ybar), 0.31, as such images only fool
the client's classifier. With 10 to 300 images per class: q proportional 0.75, q ~ sqrt(n_{k,c}) 0.57. If synthetic
images have other label frequencies than real ones, the discriminator can rely on the label alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts, Weights
from ..data.transforms import augment, drawn_to_input, drawn_to_stored, to_generator_range, to_input, to_pm1
from ..federated.local_training import Shard, batches, no_progress
from ..models.classifiers import Classifier
from ..models.discriminator import SharedTrunkDiscriminator, build_discriminator
from ..models.generator import Generator, build_generator
from ..models.image_bank import ImageBank, build_image_bank
from ..models.joint_discriminator import JointDiscriminator, JointSamples, read_samples, relaxed_texts, straight_through
from ..models.multimodal_generator import MultimodalGenerator
from ..models.optimizers import Adam
from ..models.state_dict import bn_statistics, freeze, load_weights, to_weights, uninitialised, use_precision
from .diff_augment import diff_augment
from .losses import adversarial_loss, discriminator_loss, diversity_loss, entropy_loss, inversion_probe

AnyGenerator = Generator | MultimodalGenerator | ImageBank

NUM_SAMPLES = 64  # sample images that are stored
NUM_EVALUATED = 512  # images for the health figures, at least
NUM_EVALUATED_PER_CLASS = 16  # the same per class that the client owns
NUM_COMPARED = 256  # synthetic and real images to compare in variety
NUM_SNAPSHOT_IMAGES, NUM_SNAPSHOTS = 8, 5  # images of fixed latents, and snapshots of them during training


def classifier_view(fake: Tensor, gan_range: str, facts: DataFacts) -> Tensor:
    """Convert a generator's output in [-1, 1] to classifier input (D11).

    With ``gan_range`` = ``model_norm`` the output is used unchanged: the GAN is trained on normalised images. Tanh
    cannot reach their values beyond [-1, 1].
    """
    return fake if gan_range == "model_norm" else drawn_to_input(fake, facts)


def pixels_of(fake: Tensor, gan_range: str, facts: DataFacts) -> Tensor:
    """Convert a generator's output to uint8 images [B, channels, H, W], or to records, on its device."""
    if facts.modalities:
        return drawn_to_stored(fake, facts)
    if gan_range == "model_norm":
        shape = (1, -1, 1, 1)
        mean, std = fake.new_tensor(facts.mean).view(shape), fake.new_tensor(facts.std).view(shape)
        unit = fake * std + mean
    else:
        unit = (fake + 1) / 2
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def to_pixels(fake: Tensor, gan_range: str, facts: DataFacts) -> np.ndarray:
    """Convert a generator's output to uint8 images [B, channels, H, W]."""
    return pixels_of(fake, gan_range, facts).cpu().numpy()


def num_steps(config: GeneratorConfig, num_samples: int) -> int:
    """Return the number of training steps for a client with ``num_samples`` images."""
    return config.epochs * max(1, -(-num_samples // config.batch_size)) if config.epochs else config.steps


def latents(generator: AnyGenerator, count: int, draws: torch.Generator, device: torch.device) -> Tensor:
    """Draw z ~ N(0, I) [count, latent_dim] on the CPU, so that all devices get the same numbers."""
    return torch.randn(count, generator.latent_dim, generator=draws).to(device)


def label_cdf(labels: Tensor, num_classes: int) -> Tensor:
    """Return the cumulative shares of the classes in ``labels`` [n], float64 [C]."""
    return torch.bincount(labels, minlength=num_classes).cumsum(0).double() / len(labels)


def draw(generator: AnyGenerator, count: int, draws: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """Draw the generator's inputs: (latents,), or (latents, labels int64 [count]) if it is conditional.

    Labels are a systematic sample of its label distribution in random order: the count of each class differs from its
    expectation by less than one. Drawn on the CPU and compared as float64, so that all devices agree.
    """
    z = latents(generator, count, draws, device)
    if not generator.num_classes:
        return (z,)
    places = (torch.arange(count) + torch.rand(1, generator=draws, dtype=torch.float64)) / count
    places = places[torch.randperm(count, generator=draws)].clamp(max=1 - 2**-53)
    return z, torch.searchsorted(generator.label_cdf, places.to(device), right=True)


def sample(generator: AnyGenerator, count: int, draws: torch.Generator, device: torch.device) -> Tensor:
    """Generate ``count`` images float32 [count, channels, H, W] in [-1, 1], with drawn labels if conditional."""
    images: Tensor = generator(*draw(generator, count, draws, device))
    return images.float()


def real_batches(
    shard: Shard, config: GeneratorConfig, facts: DataFacts, address: tuple[int, int], steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``steps`` batches of real images, in the range ``gan_range``, and labels; none if no image is usable."""
    seed, client_id = address
    usable = torch.arange(len(shard), device=shard.labels.device)
    if config.drop_class0_bug:
        usable = usable[shard.labels != 0]
    if not len(usable):
        return
    draws = stream(seed, "generator/augment", client_id)
    for rows in batches(len(usable), config.batch_size, steps, generator=stream(seed, "generator/batches", client_id)):
        rows = usable[rows.to(usable.device)]
        images = shard.images[rows]
        if config.gan_augment:
            images = augment(images, facts.augmentations, draws)
        real = to_input(images, facts) if config.gan_range == "model_norm" else to_generator_range(images, facts)
        yield real, shard.labels[rows]


GAN_LOSSES = ("loss", "discriminator_loss", "entropy", "diversity")


class TrainedGenerator(NamedTuple):
    """Weights, ``NUM_SAMPLES`` uint8 images, health figures, and a curve of rows [step, *losses named in ``losses``].

    ``progress``: ``images`` uint8 [T, n, channels, H, W] of the same latents after ``steps`` int64 [T].
    """

    weights: Weights
    samples: np.ndarray
    figures: dict[str, float]
    curve: list[list[float]]
    progress: Weights
    losses: tuple[str, ...] = GAN_LOSSES


def train_generator(
    classifier: Classifier,
    bn_targets: Weights | None,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    precision: str,
    progress: Callable[[int, int], None] = no_progress,
    global_model: Classifier | None = None,
) -> TrainedGenerator:
    """Train one client's generator; ``address`` is (seed, client).

    Minimises L_G = L_adv + lambda_e L_ent + lambda_d L_div + lambda_i 1[n_k < tau] scale L_inv (if ``conditional``
    lambda_e L_y replaces the two middle terms) with one discriminator and one generator step per batch, Adam for both.
    ``classifier`` is the client's, frozen and in eval mode unless ``classifier_mode`` is train (as the authors': batch
    statistics of synthetic images). ``bn_targets``: the global model's state dict, running statistics for L_inv, which
    are met by ``global_model`` if given, else by the client's network. ``progress(done, total)`` counts steps, and then
    batches of the images that are measured.

    Samples of several modalities meet a ``JointDiscriminator``, and no inversion loss; the classifier reads their texts
    as weights of tokens.
    """
    seed, client_id = address
    device = shard.images.device
    with seeded(seed, "generator/init", client_id):
        shape = facts.channels, facts.image_size, facts.num_classes
        generator = generator_for(config, facts).to(device)
        if facts.modalities:
            generator.held.copy_((shard.images[:, 0, 0, -len(facts.modalities) :] > 0).any(0))
            discriminator: nn.Module = JointDiscriminator(config, facts.modalities, facts.num_classes).to(device)
        elif config.discriminator == "dcgan":
            discriminator = build_discriminator(config, *shape).to(device)
        else:
            discriminator = SharedTrunkDiscriminator(classifier, generator.num_classes).to(device)
    if config.labelled:
        generator.label_cdf.copy_(label_cdf(shard.labels, facts.num_classes))
    freeze(classifier)
    if global_model is not None:
        freeze(global_model)
    classifier.train(config.classifier_mode == "train")
    counts = torch.bincount(shard.labels, minlength=facts.num_classes)
    support = None if config.div_support == "all" else counts > 0
    shares = counts.float() / counts.sum() if config.div_support == "shares" else None
    inverts = len(shard) < config.tau and config.lambda_i > 0 and not facts.modalities
    lr, betas = config.learning_rate, (config.beta1, config.beta2)
    adam_g = Adam(generator.parameters(), lr=lr, betas=betas)
    adam_d = Adam([p for p in discriminator.parameters() if p.requires_grad], lr=lr, betas=betas)
    draws = stream(seed, "generator/z", client_id)
    steps, curve, discriminator_hits = num_steps(config, len(shard)), [], []
    snapshots, moments = dict[int, np.ndarray](), snapshot_steps(steps)
    snapshot_input = draw(generator, NUM_SNAPSHOT_IMAGES, stream(seed, "generator/watched", client_id), device)
    shared = config.discriminator == "shared_trunk"
    changes = stream(seed, "generator/diff_augment", client_id)

    def discriminate(images: Any, labels: Sequence[Tensor] = ()) -> Tensor:
        images = diff_augment(images, changes) if config.diff_augment else images
        # A shared trunk belongs to a classifier, so it always reads classifier inputs.
        images = classifier_view(images, config.gan_range, facts) if shared else images
        with use_precision(precision, device):
            logits: Tensor = discriminator(images, *labels)
        return logits.float()

    real: Any
    fake: Any
    for step, (real, labels) in enumerate(real_batches(shard, config, facts, address, steps)):
        z, *asked = draw(generator, config.batch_size, draws, device)
        if facts.modalities:
            real = read_samples(real, facts.modalities)
            with use_precision(precision, device):
                found = generator.parts(z, *asked, held=True)
            fake, texts = relaxed(found, real, len(z), facts)
            seen = classifier_view(generator.rows(found, len(z)), config.gan_range, facts)
        else:
            with use_precision(precision, device):
                fake = generator(z, *asked)
            fake, texts = fake.float(), {}
            seen = classifier_view(fake, config.gan_range, facts)
        on_real, on_fake = discriminate(real, [labels] if asked else []), discriminate(fake.detach(), asked)
        loss_d = discriminator_loss(on_real, on_fake)
        if step >= steps - -(-steps // 4):
            hits = torch.stack([(on_real > 0).float().mean(), (on_fake < 0).float().mean()])
            discriminator_hits.append(hits.detach())
        adam_d.zero_grad(set_to_none=True)
        loss_d.backward()
        adam_d.step()

        with contextlib.ExitStack() as block:
            block.enter_context(relaxed_texts(classifier, texts))
            probed = global_model or classifier
            inversion = block.enter_context(inversion_probe(probed, bn_targets)) if inverts else None
            block.enter_context(use_precision(precision, device))
            logits = classifier(seen).float()
            if inverts and global_model is not None:
                global_model(seen)
        entropy, diversity = entropy_loss(logits), diversity_loss(logits, support, shares)
        loss_g = adversarial_loss(discriminate(fake, asked))
        if asked:
            loss_g = loss_g + config.lambda_e * nn.functional.cross_entropy(logits, asked[0])
        else:
            loss_g = loss_g + config.lambda_e * entropy + config.lambda_d * diversity
        if inversion:
            loss_g = loss_g + config.lambda_i * config.inversion_scale * inversion()
        adam_g.zero_grad(set_to_none=True)
        loss_g.backward()
        adam_g.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append([step, *(float(x.detach()) for x in (loss_g, loss_d, entropy, diversity))])
        if step + 1 in moments:
            with torch.no_grad():
                images = generator.eval()(*snapshot_input).float()
            snapshots[step + 1] = to_pixels(images, config.gan_range, facts)
            generator.train()
        progress(step + 1, steps)

    more: dict[str, float] = {}
    if discriminator_hits:
        real_known, fake_known = torch.stack(discriminator_hits).mean(0).tolist()
        more = {"discriminator_real": real_known, "discriminator_fake": fake_known}
        more["discriminator_accuracy"] = min(real_known, fake_known)
    made = measured(generator, classifier, shard, config, facts, address, snapshots, curve, progress)
    return made._replace(figures={**made.figures, **more})


def measured(
    generator: AnyGenerator,
    classifier: Classifier,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    snapshots: dict[int, np.ndarray],
    curve: list[list[float]],
    progress: Callable[[int, int], None],
    losses: tuple[str, ...] = GAN_LOSSES,
) -> TrainedGenerator:
    """Freeze a generator, and the classifier, and measure it: ``evaluate_generator`` and ``compare_with_real``.

    ``snapshots``: uint8 images by number of steps. ``progress`` goes on behind the steps of ``config``.
    """
    steps = num_steps(config, len(shard))
    freeze(generator)
    freeze(classifier)
    counts = torch.bincount(shard.labels, minlength=facts.num_classes)
    figures, pixels = evaluate_generator(
        generator, classifier, counts, config, facts, address, lambda done, total: progress(steps + done, steps + total)
    )
    figures |= compare_with_real(generator, classifier, shard, config, facts, address)
    snapshots = snapshots or {0: pixels[:NUM_SNAPSHOT_IMAGES]}  # no step was taken
    pictures = {"images": np.stack([*snapshots.values()]), "steps": np.array([*snapshots], np.int64)}
    return TrainedGenerator(to_weights(generator), pixels, figures, curve, pictures, losses)


def relaxed(
    found: Mapping[str, Tensor], real: JointSamples, count: int, facts: DataFacts
) -> tuple[JointSamples, dict[str, Tensor]]:
    """Return drawn samples as a discriminator reads them, and their texts as weights of tokens [count, V, L].

    A synthetic sample has the modalities of a real one, so that their absence tells nothing.

    Args:
        found: what the decoders of the modalities that the client has give (``MultimodalGenerator.parts``).
        real: the real samples of the step.
        count: the number of synthetic ones.
        facts: of the data set.
    """
    kinds = {modality.name: modality.kind for modality in facts.modalities}
    texts = {name: straight_through(value) for name, value in found.items() if kinds[name] == "text"}
    values = {name: texts.get(name, value.float()) for name, value in found.items()}
    present = real.present[torch.arange(count, device=real.present.device) % len(real.present)]
    return JointSamples(values, present), texts


def snapshot_steps(steps: int) -> tuple[int, ...]:
    """Return the steps after which snapshots are taken: geometric from a sixteenth of ``steps`` to ``steps``."""
    if not steps:
        return ()
    return tuple(np.unique(np.geomspace(max(1, steps // 16), steps, NUM_SNAPSHOTS).round().astype(int)).tolist())


@torch.no_grad()
def evaluate_generator(
    generator: AnyGenerator,
    classifier: Classifier,
    counts: Tensor,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    progress: Callable[[int, int], None] = no_progress,
) -> tuple[dict[str, float], np.ndarray]:
    """Measure how well a generator covers its client's classes (docs/algorithm.md 4.1); returns figures and samples.

    ``counts`` [C]: the client's label counts; a class with images is owned. Figures, each in [0, 1]: ``coverage``,
    share of owned classes with at least 1 % of the predictions (a tenth of an equal share for more than ten classes);
    ``image_coverage``, share of the client's images in such classes; ``owned_mass``, share of predictions of owned
    classes; ``marginal_entropy``, entropy of the mean prediction over log |owned| (0 with one owned class), and
    ``label_entropy``, the same of the client's labels; ``confidence``, mean largest probability; if conditional
    ``label_agreement``, share of images that are predicted as their label.
    """
    seed, client_id = address
    owned = counts > 0
    num_owned = int(owned.sum())
    count = max(NUM_EVALUATED, NUM_EVALUATED_PER_CLASS * num_owned)
    drawn = draw(generator, count, stream(seed, "generator/judge", client_id), owned.device)
    logits: list[Tensor] = []
    pixels = np.empty(0)
    parts = list(zip(*(x.split(NUM_EVALUATED) for x in drawn), strict=True))
    for part in parts:
        fake = generator(*part).float()
        pixels = pixels if logits else to_pixels(fake[:NUM_SAMPLES], config.gan_range, facts)
        logits.append(classifier(classifier_view(fake, config.gan_range, facts)).float())
        progress(len(logits), len(parts))
    probabilities = torch.cat(logits).softmax(1)
    found = probabilities.argmax(1)
    shares = torch.bincount(found, minlength=facts.num_classes).float() / count
    mean = probabilities.mean(0)
    own = counts.double() / counts.sum()
    shown = owned & (shares >= min(0.01, 0.1 / num_owned))
    entropies = [
        -float(torch.xlogy(p, p).sum()) / float(np.log(num_owned)) if num_owned > 1 else 0.0 for p in (mean, own)
    ]
    figures = {
        "coverage": float(shown[owned].float().mean()),
        "image_coverage": float(own[shown].sum()),
        "owned_mass": float(shares[owned].sum()),
        "marginal_entropy": entropies[0],
        "label_entropy": entropies[1],
        "confidence": float(probabilities.max(1).values.mean()),
        "owned_classes": float(num_owned),
    }
    if len(drawn) > 1:
        figures["label_agreement"] = float((found == drawn[1]).float().mean())
    return figures, pixels


@torch.no_grad()
def compare_with_real(
    generator: AnyGenerator,
    classifier: Classifier,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
) -> dict[str, float]:
    """Compare a client's synthetic images with its real ones (docs/algorithm.md 4.1).

    ``variety`` >= 0: total variance of the classifier's features, relative to real images (1 if those have none);
    ``bn_gap`` >= 0: L_inv of synthetic images over L_inv of real ones, if the classifier has batch norm, and samples
    are images alone; ``out_of_range`` in [0, 1]: share of the real images' values outside the range of tanh (D11).
    """
    seed, client_id = address
    rows = torch.linspace(0, len(shard) - 1, min(len(shard), NUM_COMPARED)).long()
    real = to_input(shard.images[rows], facts)
    fake = sample(generator, NUM_COMPARED, stream(seed, "generator/compare", client_id), shard.images.device)
    probed, gaps, variances = bool(bn_statistics(classifier)) and not facts.modalities, [], []
    for images in (real, classifier_view(fake, config.gan_range, facts)):
        with inversion_probe(classifier) as inversion:
            features = classifier.features(images).float()
        gaps += [float(inversion())] if probed else []
        variances.append(float(features.var(0).sum()) if len(features) > 1 else 0.0)
    played = real if config.gan_range == "model_norm" or facts.modalities else to_pm1(shard.images[rows])
    figures = {
        "variety": variances[1] / variances[0] if variances[0] > 0 else 1.0,
        "out_of_range": 0.0 if facts.modalities else float((played.abs() > 1 + 1e-6).float().mean()),
    }
    return figures | ({"bn_gap": gaps[1] / gaps[0]} if probed and gaps[0] > 0 else {})


def sampling_shares(config_sampling: str, sizes: np.ndarray, figures: list[dict[str, float]]) -> np.ndarray:
    """Return float64 [K] of sum 1: each generator's share of a synthetic batch (K4).

    ``uniform``: equal (the authors). ``proportional``: by n_k. ``quality`` (ours): by sqrt(n_k) x coverage x owned
    mass, so that neither a client with few images nor a collapsed generator dominates. If conditional, label agreement
    replaces coverage x owned mass: it is at most the owned mass, falls with every class that is not shown, and classes
    with few images hardly change it. ``covered`` (ours): as ``quality``, with the share of the client's images whose
    classes are shown in the place of coverage, in which a class of one image counts as much as any.
    """
    if config_sampling == "uniform":
        shares: np.ndarray = np.ones(len(sizes))
    elif config_sampling == "proportional":
        shares = sizes.astype(np.float64)
    else:
        shown = "image_coverage" if config_sampling == "covered" else "coverage"
        quality = np.array([f.get("label_agreement", f[shown] * f["owned_mass"]) for f in figures])
        shares = np.sqrt(sizes) * np.maximum(quality, 1e-3)
    return np.asarray(shares / shares.sum())


def allocate(shares: np.ndarray, total: int) -> np.ndarray:
    """Distribute ``total`` by ``shares``: int64 [K] of that sum, by largest remainders (ties to the lower client)."""
    exact = shares * total
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    for k in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[k] += 1
    return counts


def generator_for(config: GeneratorConfig, facts: DataFacts) -> Any:
    """Build a fresh generator of ``config.family`` for this data set; call it inside ``seeded``."""
    if facts.modalities:
        return MultimodalGenerator(config, facts.modalities, facts.num_classes)
    if config.family == "condensed":
        return build_image_bank(config, facts.channels, facts.image_size, facts.num_classes)
    return build_generator(config, facts.channels, facts.image_size, facts.num_classes)


def load_generator(config: GeneratorConfig, facts: DataFacts, weights: Weights) -> Generator:
    """Build a frozen generator with ``weights``."""
    with uninitialised():
        generator: Generator = generator_for(config, facts)
    return freeze(load_weights(generator, weights))
