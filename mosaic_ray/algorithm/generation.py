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

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..data.transforms import augment, normalise, pm1_to_normalised, to_pm1
from ..models.discriminators import SharedTrunkDiscriminator, build_discriminator
from ..models.generators import build_generator
from ..models.tensors import freeze, load_weights, to_weights, use_precision
from ..records import DataFacts, Finding, Weights
from ..rooms import GeneratorConfig
from ..seeding import seeded, stream
from .local_training import Shard, batches
from .losses import adversarial_loss, discriminator_loss, diversity_loss, entropy_loss, inversion_probe

NUM_SAMPLES = 64  # images kept for people to look at
NUM_JUDGED = 512  # images behind the health figures, and of them at least
NUM_JUDGED_PER_CLASS = 16  # for each class that a client owns


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
) -> tuple[Weights, np.ndarray, dict[str, float], list[list[float]]]:
    """Train one client's generator; ``address`` is (seed, client).

    L_G = L_adv + lambda_e L_ent + lambda_d L_div + lambda_i 1[n_k < tau] scale L_inv, one discriminator and one
    generator step per batch, Adam for both; where ``conditional``, lambda_e L_y for the two terms in the middle.
    ``classifier`` is the client's (frozen, eval) unless ``classifier_mode`` is train (the authors' way, whose batch
    statistics come from the fakes). ``bn_targets`` are the global model's running statistics for L_inv.

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
    owned = torch.bincount(shard.labels, minlength=facts.num_classes) > 0
    support = owned if config.div_support == "owned" else None
    inverts = len(shard) < config.tau and config.lambda_i > 0
    betas = (config.beta1, config.beta2)
    adam_g = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=betas)
    adam_d = torch.optim.Adam([p for p in discriminator.parameters() if p.requires_grad], lr=config.lr, betas=betas)
    draws = stream(seed, "generator/z", client_id)
    steps, curve = num_steps(config, len(shard)), []
    shared = config.discriminator == "shared_trunk"

    def judge(images: Tensor, told: Sequence[Tensor] = ()) -> Tensor:
        # the shared trunk is a classifier: it reads classifier inputs whatever range the game is played in
        with use_precision(precision, device):
            return discriminator(classifier_view(images, config.gan_range, facts) if shared else images, *told).float()

    for step, (real, labels) in enumerate(real_batches(shard, config, facts, address, steps)):
        z, *asked = draw(generator, config.batch_size, draws, device)
        with use_precision(precision, device):
            fake = generator(z, *asked)
        fake = fake.float()
        loss_d = discriminator_loss(judge(real, [labels] if asked else []), judge(fake.detach(), asked))
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
            loss_g = adversarial_loss(judge(fake, asked)) + steering + inversion
        else:
            loss_g = adversarial_loss(judge(fake)) + config.lambda_e * entropy + config.lambda_d * diversity + inversion
        adam_g.zero_grad(set_to_none=True)
        loss_g.backward()
        adam_g.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append([step, *(float(x.detach()) for x in (loss_g, loss_d, entropy, diversity))])

    freeze(generator)
    freeze(classifier)
    figures, pixels = judge_generator(generator, classifier, owned, config, facts, address)
    return to_weights(generator), pixels, figures, curve


@torch.no_grad()
def judge_generator(
    generator: nn.Module,
    classifier: nn.Module,
    owned: Tensor,
    config: GeneratorConfig,
    facts: DataFacts,
    address: tuple[int, int],
) -> tuple[dict[str, float], np.ndarray]:
    """(figures, sample images): how well a generator covers the classes that its client owns (ALGORITHM 4.1).

    ``coverage``: share of owned classes that get at least 1 % of the predictions, or a tenth of an equal share where
    the client owns more than ten; ``owned_mass``: share of predictions on owned classes; ``marginal_entropy``: entropy
    of the mean prediction over log |owned| (0 with one owned class); ``confidence``: mean largest probability; and of a
    conditional one ``label_agreement``: share of images that show the classifier the class asked for.
    """
    seed, client_id = address
    num_owned = int(owned.sum())
    count = max(NUM_JUDGED, NUM_JUDGED_PER_CLASS * num_owned)
    drawn = draw(generator, count, stream(seed, "generator/judge", client_id), owned.device)
    logits, pixels = [], np.empty(0)
    for part in zip(*(x.split(NUM_JUDGED) for x in drawn), strict=True):
        fake = generator(*part).float()
        pixels = pixels if logits else to_pixels(fake[:NUM_SAMPLES], config.gan_range, facts)
        logits.append(classifier(classifier_view(fake, config.gan_range, facts)).float())
    probabilities = torch.cat(logits).softmax(1)
    found = probabilities.argmax(1)
    shares = torch.bincount(found, minlength=facts.num_classes).float() / count
    mean = probabilities.mean(0)
    entropy = -float(torch.xlogy(mean, mean).sum())
    figures = {
        "coverage": float((shares[owned] >= min(0.01, 0.1 / num_owned)).float().mean()),
        "owned_mass": float(shares[owned].sum()),
        "marginal_entropy": entropy / float(np.log(num_owned)) if num_owned > 1 else 0.0,
        "confidence": float(probabilities.max(1).values.mean()),
        "owned_classes": float(num_owned),
    }
    if len(drawn) > 1:
        figures["label_agreement"] = float((found == drawn[1]).float().mean())
    return figures, pixels


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


def generator_findings(client_id: int, figures: dict[str, float]) -> list[Finding]:
    """What to tell people about one generator (ALGORITHM 4.1's alarms); label agreement covers a conditional one."""
    owned, findings = int(figures["owned_classes"]), []
    if "label_agreement" in figures:
        if figures["label_agreement"] < 0.5:
            findings.append(
                Finding(
                    "generator.label_agreement", "warning", "generators",
                    f"{figures['label_agreement']:.0%} of its images show its classifier the class asked for; raise "
                    "generator.steps",
                    client_id, figures["label_agreement"],
                )
            )  # fmt: skip
    elif owned >= 2 and figures["marginal_entropy"] < 0.2:
        findings.append(
            Finding(
                "generator.mode_collapse", "warning", "generators",
                f"its images fall on one class (marginal entropy {figures['marginal_entropy']:.2f} of log {owned}); "
                "raise generator.lambda_d or generator.steps",
                client_id, figures["marginal_entropy"],
            )
        )  # fmt: skip
    elif figures["coverage"] < 0.5:
        findings.append(
            Finding(
                "generator.low_coverage", "warning", "generators",
                f"it shows {figures['coverage'] * owned:.0f} of its {owned} classes; raise generator.steps",
                client_id, figures["coverage"],
            )
        )  # fmt: skip
    return findings


def load_generator(config: GeneratorConfig, facts: DataFacts, weights: Weights) -> nn.Module:
    """A frozen generator with ``weights``."""
    return freeze(load_weights(build_generator(config, facts.channels, facts.image_size, facts.num_classes), weights))
