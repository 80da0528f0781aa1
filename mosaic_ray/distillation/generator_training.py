"""A client's generator: a small GAN on local data, steered by the local classifier (ALGORITHM stage G).

With ``generator.conditional`` it is asked for classes. Labels y are drawn as the client owns them, q_c = n_{k,c} / n_k,
and both players are told them. L_ent + L_div is minus the mutual information of an image and the class predicted for
it. That of an image and the class asked for is at least H(q) - L_y, with L_y the classifier's cross-entropy on y
(Barber & Agakov 2003): L_y stands in the place of both terms, weighed by lambda_e; lambda_d and div_support have no
part. For a batch with label frequencies q and mean prediction ybar, KL(q || ybar) <= L_y by convexity: as L_y falls,
predictions spread as q does, and none are left for classes that the client lacks.

What was measured, by the share of images that show the class asked for to a classifier with no part in the game
(Fashion-MNIST at 16x16, ngf 16, 400 steps, one seed): L_y weighed by 1, 0.55; by 5, 0.40; by 1 and KL(q || ybar) by
5 beside it, 0.31: those images fool the client's classifier. With 300 to 10 images a class, q proportional 0.75 and
q ~ sqrt(n_{k,c}) 0.57: where fakes have other label frequencies than real images, the discriminator can go by the
label, which teaches a generator nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import GeneratorConfig
from ..core.seeding import seeded, stream
from ..core.types import DataFacts, Weights
from ..data.transforms import augment, normalise, pm1_to_normalised, to_pm1
from ..federated.local_training import Shard, batches
from ..models.batch_norm import bn_statistics
from ..models.discriminator import SharedTrunkDiscriminator, build_discriminator
from ..models.generator import build_generator
from ..models.state_dict import freeze, load_weights, to_weights, use_precision
from .losses import adversarial_loss, discriminator_loss, diversity_loss, entropy_loss, inversion_probe

NUM_SAMPLES = 64  # images kept for people to look at
NUM_EVALUATED = 512  # images behind the health figures, and of them at least
NUM_EVALUATED_PER_CLASS = 16  # for each class that a client owns
NUM_COMPARED = 256  # synthetic images, and real ones, of which the variety is compared
NUM_SNAPSHOT_IMAGES, NUM_SNAPSHOTS = 8, 5  # images of fixed latents, and snapshots of them during training


def classifier_view(fake: Tensor, gan_range: str, facts: DataFacts) -> Tensor:
    """A generator's output [-1, 1] as a classifier's input (D11).

    ``model_norm``: as it is, the game was played on normalised images (whose tails tanh cannot reach).
    """
    return fake if gan_range == "model_norm" else pm1_to_normalised(fake, facts.mean, facts.std)


def to_pixels(fake: Tensor, gan_range: str, facts: DataFacts) -> np.ndarray:
    """A generator's output as uint8 images to look at."""
    if gan_range == "model_norm":
        shape = (1, -1, 1, 1)
        mean, std = fake.new_tensor(facts.mean).view(shape), fake.new_tensor(facts.std).view(shape)
        unit = fake * std + mean
    else:
        unit = (fake + 1) / 2
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def num_steps(config: GeneratorConfig, num_samples: int) -> int:
    """Steps for a client with ``num_samples`` images."""
    return config.epochs * max(1, -(-num_samples // config.batch_size)) if config.epochs else config.steps


def latents(generator: nn.Module, count: int, draws: torch.Generator, device: torch.device) -> Tensor:
    """z ~ N(0, I) [count, latent_dim], drawn on the CPU so that devices agree."""
    return torch.randn(count, generator.latent_dim, generator=draws).to(device)


def label_cdf(labels: Tensor, num_classes: int) -> Tensor:
    """Cumulative shares of the classes in ``labels`` [n], float64 [C]."""
    return torch.bincount(labels, minlength=num_classes).cumsum(0).double() / len(labels)


def draw(generator: nn.Module, count: int, draws: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """What ``generator`` takes: (latents,), or (latents, labels int64 [count]) where it is conditional.

    Labels are a systematic sample of its label distribution, in random order: each class comes up within one of its
    expected number of times. Drawn on the CPU, and compared as float64, so that devices agree.
    """
    z = latents(generator, count, draws, device)
    if not generator.num_classes:
        return (z,)
    places = (torch.arange(count) + torch.rand(1, generator=draws, dtype=torch.float64)) / count
    places = places[torch.randperm(count, generator=draws)].clamp(max=1 - 2**-53)
    return z, torch.searchsorted(generator.label_cdf, places.to(device), right=True)


def sample(generator: nn.Module, count: int, draws: torch.Generator, device: torch.device) -> Tensor:
    """``count`` images float32 [count, channels, H, W] in [-1, 1]; a conditional one draws their labels too."""
    images: Tensor = generator(*draw(generator, count, draws, device))
    return images.float()


def real_batches(
    shard: Shard, config: GeneratorConfig, facts: DataFacts, address: tuple[int, int], steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The game's real images, in the range that ``gan_range`` asks for, and labels; nothing where none may play."""
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
        real = normalise(images, facts.mean, facts.std) if config.gan_range == "model_norm" else to_pm1(images)
        yield real, shard.labels[rows]


def train_generator(
    classifier: nn.Module,
    bn_targets: Weights | None,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
    precision: str,
    on_snapshot: Callable[[int, np.ndarray], None] | None = None,
) -> tuple[Weights, np.ndarray, dict[str, float], list[list[float]]]:
    """Train one client's generator; ``address`` is (seed, client).

    L_G = L_adv + lambda_e L_ent + lambda_d L_div + lambda_i 1[n_k < tau] scale L_inv, one discriminator and one
    generator step per batch, Adam for both; where ``conditional``, lambda_e L_y for the two terms in the middle.
    ``classifier`` is the client's (frozen, eval) unless ``classifier_mode`` is train (the authors' way, whose batch
    statistics come from the fakes). ``bn_targets`` are the global model's running statistics for L_inv.
    ``watch(steps done, images)`` gets uint8 images of the same latents at a few ``snapshot_steps``, the end among them.

    Returns (weights, sample images uint8, health figures, curve rows [step, loss_g, loss_d, entropy, diversity]).
    """
    seed, client_id = address
    device = shard.images.device
    with seeded(seed, "generator/init", client_id):
        shape = facts.channels, facts.image_size, facts.num_classes
        generator = build_generator(config, *shape).to(device)
        if config.discriminator == "dcgan":
            discriminator: nn.Module = build_discriminator(config, *shape).to(device)
        else:
            discriminator = SharedTrunkDiscriminator(classifier, generator.num_classes).to(device)
    if config.conditional:
        generator.label_cdf.copy_(label_cdf(shard.labels, facts.num_classes))
    freeze(classifier)
    classifier.train(config.classifier_mode == "train")
    counts = torch.bincount(shard.labels, minlength=facts.num_classes)
    support = counts > 0 if config.div_support == "owned" else None
    inverts = len(shard) < config.tau and config.lambda_i > 0
    betas = (config.beta1, config.beta2)
    adam_g = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=betas)
    adam_d = torch.optim.Adam([p for p in discriminator.parameters() if p.requires_grad], lr=config.lr, betas=betas)
    draws = stream(seed, "generator/z", client_id)
    steps, curve, discriminator_hits = num_steps(config, len(shard)), [], []
    snapshots = snapshot_steps(steps) if on_snapshot else ()
    snapshot_draws = stream(seed, "generator/watched", client_id)
    snapshot_input = draw(generator, NUM_SNAPSHOT_IMAGES, snapshot_draws, device) if on_snapshot else ()
    shared = config.discriminator == "shared_trunk"

    def discriminate(images: Tensor, labels: Sequence[Tensor] = ()) -> Tensor:
        # A shared trunk belongs to a classifier, so it always reads classifier inputs.
        images = classifier_view(images, config.gan_range, facts) if shared else images
        with use_precision(precision, device):
            return discriminator(images, *labels).float()

    for step, (real, labels) in enumerate(real_batches(shard, config, facts, address, steps)):
        z, *asked = draw(generator, config.batch_size, draws, device)
        with use_precision(precision, device):
            fake = generator(z, *asked)
        fake = fake.float()
        on_real, on_fake = discriminate(real, [labels] if asked else []), discriminate(fake.detach(), asked)
        loss_d = discriminator_loss(on_real, on_fake)
        if step >= steps - -(-steps // 4):
            hits = torch.stack([(on_real > 0).float().mean(), (on_fake < 0).float().mean()])
            discriminator_hits.append(hits.detach())
        adam_d.zero_grad(set_to_none=True)
        loss_d.backward()
        adam_d.step()

        seen = classifier_view(fake, config.gan_range, facts)
        if inverts:
            with inversion_probe(classifier, bn_targets) as probe, use_precision(precision, device):
                logits = classifier(seen).float()
            inversion = config.lambda_i * config.inversion_scale * probe.loss()
        else:
            with use_precision(precision, device):
                logits = classifier(seen).float()
            inversion = 0.0
        entropy, diversity = entropy_loss(logits), diversity_loss(logits, support)
        if asked:
            steering = config.lambda_e * nn.functional.cross_entropy(logits, *asked)
            loss_g = adversarial_loss(discriminate(fake, asked)) + steering + inversion
        else:
            steering = config.lambda_e * entropy + config.lambda_d * diversity
            loss_g = adversarial_loss(discriminate(fake)) + steering + inversion
        adam_g.zero_grad(set_to_none=True)
        loss_g.backward()
        adam_g.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append([step, *(float(x.detach()) for x in (loss_g, loss_d, entropy, diversity))])
        if on_snapshot and step + 1 in snapshots:
            on_snapshot(step + 1, snapshot_images(generator, snapshot_input, config, facts))

    freeze(generator)
    freeze(classifier)
    figures, pixels = evaluate_generator(generator, classifier, counts, config, facts, address)
    if discriminator_hits:
        real_known, fake_known = torch.stack(discriminator_hits).mean(0).tolist()
        figures |= {"discriminator_real": real_known, "discriminator_fake": fake_known}
        figures["discriminator_accuracy"] = min(real_known, fake_known)
    figures |= compare_with_real(generator, classifier, shard, config, facts, address)
    return to_weights(generator), pixels, figures, curve


def snapshot_steps(steps: int) -> tuple[int, ...]:
    """Steps after which a generator is looked at: ever farther apart, from a sixteenth of the way to the end."""
    return tuple(np.unique(np.geomspace(max(1, steps // 16), steps, NUM_SNAPSHOTS).round().astype(int)).tolist())


@torch.no_grad()
def snapshot_images(
    generator: nn.Module, latent: Sequence[Tensor], config: GeneratorConfig, facts: DataFacts
) -> np.ndarray:
    """uint8 [n, C, H, W] of what ``draw`` gave, as the generator would be used; it goes on as it was."""
    training = generator.training
    images = to_pixels(generator.eval()(*latent).float(), config.gan_range, facts)
    generator.train(training)
    return images


@torch.no_grad()
def evaluate_generator(
    generator: nn.Module,
    classifier: nn.Module,
    counts: Tensor,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
) -> tuple[dict[str, float], np.ndarray]:
    """(figures, sample images): how well a generator covers the classes that its client owns (ALGORITHM 4.1).

    ``counts`` [C]: the client's label counts. ``coverage``: share of owned classes that get at least 1 % of the
    predictions, or a tenth of an equal share where the client owns more than ten, and ``image_coverage`` of the
    client's images those in such classes; ``owned_mass``: share of predictions on owned classes; ``marginal_entropy``:
    entropy of the mean prediction over log |owned| (0 with one owned class), and ``label_entropy`` that of the client's
    labels; ``confidence``: mean largest probability; and of a conditional one ``label_agreement``: share of images that
    show the classifier the class asked for.
    """
    seed, client_id = address
    owned = counts > 0
    num_owned = int(owned.sum())
    count = max(NUM_EVALUATED, NUM_EVALUATED_PER_CLASS * num_owned)
    drawn = draw(generator, count, stream(seed, "generator/judge", client_id), owned.device)
    logits, pixels = [], np.empty(0)
    for part in zip(*(x.split(NUM_EVALUATED) for x in drawn), strict=True):
        fake = generator(*part).float()
        pixels = pixels if logits else to_pixels(fake[:NUM_SAMPLES], config.gan_range, facts)
        logits.append(classifier(classifier_view(fake, config.gan_range, facts)).float())
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
    generator: nn.Module,
    classifier: nn.Module,
    shard: Shard,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
) -> dict[str, float]:
    """How a client's synthetic images differ from its real ones (ALGORITHM 4.1).

    ``variety``: variance of the classifier's features, summed over them, as a share of real images' (1 where those have
    none); ``bn_gap``: L_inv of synthetic images over that of real ones, where the classifier has batch norm;
    ``out_of_range``: share of the real images' values that tanh cannot reach (D11).
    """
    seed, client_id = address
    rows = torch.linspace(0, len(shard) - 1, min(len(shard), NUM_COMPARED)).long()
    real = normalise(shard.images[rows], facts.mean, facts.std)
    fake = sample(generator, NUM_COMPARED, stream(seed, "generator/compare", client_id), shard.images.device)
    probed, gaps, variances = bool(bn_statistics(classifier)), [], []
    for images in (real, classifier_view(fake, config.gan_range, facts)):
        if probed:
            with inversion_probe(classifier) as probe:
                features = classifier.features(images).float()
            gaps.append(float(probe.loss()))
        else:
            features = classifier.features(images).float()
        variances.append(float(features.var(0).sum()) if len(features) > 1 else 0.0)
    played = real if config.gan_range == "model_norm" else to_pm1(shard.images[rows])
    figures = {
        "variety": variances[1] / variances[0] if variances[0] > 0 else 1.0,
        "out_of_range": float((played.abs() > 1 + 1e-6).float().mean()),
    }
    return figures | ({"bn_gap": gaps[1] / gaps[0]} if probed and gaps[0] > 0 else {})


def sampling_shares(config_sampling: str, sizes: np.ndarray, figures: list[dict[str, float]]) -> np.ndarray:
    """float64 [K] of sum 1: each generator's share of a synthetic batch (K4).

    ``uniform``: alike (the authors). ``proportional``: by n_k. ``quality``: by sqrt(n_k) x coverage x owned mass, so
    that neither a client of a dozen images nor a collapsed generator fills the batch (ours). For a conditional one
    label agreement stands in the place of both: it is never above owned mass, falls with each class asked for and not
    shown, and does not mind the classes that a client hardly has, for which it is hardly asked.
    """
    if config_sampling == "uniform":
        shares = np.ones(len(sizes))
    elif config_sampling == "proportional":
        shares = sizes.astype(np.float64)
    else:
        quality = np.array([f.get("label_agreement", f["coverage"] * f["owned_mass"]) for f in figures])
        shares = np.sqrt(sizes) * np.maximum(quality, 1e-3)
    return shares / shares.sum()


def allocate(shares: np.ndarray, total: int) -> np.ndarray:
    """int64 [K] summing to ``total``: largest remainders of shares * total (ties to the lower client)."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    for k in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[k] += 1
    return counts


def load_generator(config: GeneratorConfig, facts: DataFacts, weights: Weights) -> nn.Module:
    """A frozen generator with ``weights``."""
    return freeze(load_weights(build_generator(config, facts.channels, facts.image_size, facts.num_classes), weights))
