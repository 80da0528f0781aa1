"""The sections of a configuration: every knob with its default, meaning and range."""

from dataclasses import dataclass, field
from typing import Any

from .fields import knob


@dataclass(frozen=True)
class DataConfig:
    """The data set: where its samples come from, and their form."""

    name: str = knob("digits", "data set; or folder:PATH, parquet:PATH, hf:OWNER/NAME, imported:NAME")
    root: str = knob("", "where data sets lie; empty: $MOSAIC_DATA, else ~/.cache/mosaic_ray")
    image_size: int = knob(0, "pixels a side; 0: the data set's own", low=0, high=512)
    channels: int = knob(0, "1 or 3; 0: the data set's own", low=0, high=3)
    download: bool = knob(False, "fetch missing files")
    skip_bad: bool = knob(False, "leave out, and count, images that do not decode")
    image_column: str = knob("", "column of the images in parquet files; empty: found by name or type")
    label_column: str = knob("", "column of the classes in parquet files; empty: found by name or type")
    modalities: tuple[str, ...] = knob(
        (), "columns of parquet files, or views of mfeat, that make a sample: images, lists of numbers, text; none: an "
        "image, or all views",
    )  # fmt: skip
    text_length: int = knob(64, "bytes of a text that are read, with data.modalities", low=1, high=4096)


@dataclass(frozen=True)
class PartitionConfig:
    """How samples are dealt to clients."""

    num_clients: int = knob(10, "clients", low=1, high=1_000_000)
    omega: float = knob(0.1, "Dirichlet concentration; small is skewed", above=0.0, high=1e6)
    sampler: str = knob(
        "reference",
        "how labels are dealt: the authors' Dirichlet split, one over clients, one over classes, evenly, a few classes "
        "each, or evenly in classes and skewed in numbers; or file:PATH, natural:COLUMN, module:function",
        choices=("reference", "dirichlet", "balanced", "iid", "pathological", "quantity"),
        plug_in=True,
    )
    classes_per_client: int = knob(2, "classes of each client, with sampler = pathological", low=1)
    min_size: int = knob(10, "fewest samples a client may hold", low=1)
    policy: str = knob("repair", "too small a client: draw again, or move samples to it", choices=("reject", "repair"))
    max_tries: int = knob(200, "draws before reject gives up or repair repairs", low=1)
    modalities: tuple[str, ...] | str = knob(
        (), "modalities of each client, such as image+text, dealt in turn; or a rule: p:0.5 (each with this "
        "probability) or each:2 (so many, drawn); none: all clients hold all",
    )  # fmt: skip
    validation_fraction: float = knob(0.0, "share of each client's samples held out for validation", low=0.0, high=0.5)


@dataclass(frozen=True)
class ModelConfig:
    """The networks of clients, server and student."""

    classifier: str = knob("cnn", "network of clients and student; see `mosaic methods`, or module:function")
    classifiers: tuple[str, ...] = knob((), "networks of the clients, dealt in turn; none: all have model.classifier")
    student: str = knob(
        "", "a network that no client holds; after the closing rounds the server trains it with synthetic images"
    )
    width: int = knob(16, "channels of the classifier's first block (resnet18: 64 is the standard)", low=1, high=512)
    fusion: str = knob(
        "late",
        "how several modalities are joined: a head for each, the mean of their features, a mean weighted by gates, or "
        "features side by side with zeros for absent ones, or with prototypes (federation.strategy = pmcmfl)",
        choices=("late", "mean", "gated", "zero_fill", "prototypes"),
    )


@dataclass(frozen=True)
class FederationConfig:
    """What all federated rounds have in common."""

    strategy: str = knob(
        "fedavg", "federated strategy of all rounds (`mosaic methods`), or module:object; names joined by + combine"
    )
    widths: tuple[float, ...] | str = knob(
        (1.0,), "client widths, dealt in turn; or a rule such as rho:3 (docs/HETEROGENEITY.md)", above=0.0, high=1.0
    )
    scaler: bool = knob(True, "narrow clients divide activations by their width while they train (HeteroFL)")
    masked: bool = knob(False, "a client's loss and head rows leave out classes that it does not hold (HeteroFL)")
    bn_passes: int = knob(
        0, "passes that estimate exact batch-norm statistics; 0: as many as make all of them exact", low=0
    )
    cohort_size: int = knob(0, "clients asked per round; 0: all", low=0)
    drop_rate: float = knob(
        0.0, "share of the clients asked that do not answer a round, drawn anew each round", low=0.0, high=0.999
    )
    min_cohort: int = knob(
        0, "clients that must answer a round; those that fail are left out as long as so many do. 0: all asked", low=0
    )
    max_client_failures: int = knob(3, "failures of a client in one round or stage before it is given up", low=1)


@dataclass(frozen=True)
class WarmupConfig:
    """The first federated rounds, and the clients' loss in all of them."""

    num_rounds: int = knob(30, "federated rounds", low=0)
    local_steps: int = knob(10, "optimiser steps per client and round", low=1)
    batch_size: int = knob(64, "images per step", low=1, high=1_000_000)
    lr: float = knob(0.01, "SGD learning rate", above=0.0)
    lr_decay: float = knob(
        1.0, "factor of the learning rate after each round: round r has lr * lr_decay^r", above=0.0, high=1.0
    )
    loss: str = knob(
        "ce",
        "clients' loss, in the closing rounds too: cross-entropy, or that of logits adjusted by the log of a client's "
        "class shares, which leaves out the classes that it lacks",
        choices=("ce", "adjusted"),
    )
    weight_decay: float = knob(1e-4, "SGD weight decay", low=0.0)
    momentum: float = knob(0.0, "SGD momentum, fresh each round", low=0.0, high=0.999)
    shuffle: bool = knob(True, "draw batches at random; off: fixed order (D8)")
    modality_dropout: float = knob(
        0.0, "share of a sample's modalities that clients leave out in training, at random, never all of them; in the "
        "closing rounds too", low=0.0, high=0.9,
    )  # fmt: skip
    checkpoint_rounds: int = knob(5, "rounds between checkpoints", low=1)
    bn: str = knob(
        "running",
        "batch-norm statistics of the warmed-up model: the average of the clients' running ones, or exact ones of all "
        "clients' images under its weights; exact always where a client is narrow",
        choices=("running", "exact"),
    )


@dataclass(frozen=True)
class GeneratorConfig:
    """The clients' generators."""

    family: str = knob(
        "dcgan",
        "what a client trains: a GAN, a GAN whose players get labels, a variational autoencoder that gets labels, or "
        "a few condensed images of each class",
        choices=("dcgan", "cgan", "cvae", "condensed"),
    )
    stage: str = knob(
        "after_warmup",
        "which weights the generators are trained beside (G9): the converged or the initial ones",
        choices=("before", "after_warmup"),
    )
    classifier_source: str = knob(
        "client", "the classifier in the loss (G9): client's own model, or a fresh one", choices=("client", "fresh")
    )
    judge: str = knob(
        "client", "the classifier that steers a GAN and measures what generators show: the client's own model, or the "
        "global one with an LDA head of all clients' class statistics, which owes nothing to the client's classes",
        choices=("client", "calibrated"),
    )  # fmt: skip
    classifier_mode: str = knob("eval", "mode of that classifier (G6)", choices=("eval", "train"))
    classifier_epochs: int = knob(50, "local epochs of a fresh classifier", low=0)
    discriminator: str = knob("dcgan", "adversary (G11)", choices=("dcgan", "shared_trunk"))
    gan_range: str = knob(
        "pm1_then_renorm", "range of the real images in the game (D11)", choices=("model_norm", "pm1_then_renorm")
    )
    lambda_e: float = knob(1.0, "weight of the entropy loss; of the label's cross-entropy with cgan", low=0.0)
    lambda_d: float = knob(5.0, "weight of the diversity loss; none with cgan", low=0.0)
    lambda_i: float = knob(10.0, "weight of the inversion loss", low=0.0)
    inversion_scale: float = knob(1e-3, "scale of the inversion sum before lambda_i", low=0.0)
    inversion_network: str = knob(
        "client", "the network whose batch norms' inputs meet the global statistics (S13)", choices=("client", "global")
    )
    tau: int = knob(300, "clients with fewer samples than this use the inversion loss", low=0)
    div_support: str = knob(
        "owned", "classes that diversity spreads over (G8); shares: the owned ones, as often as the client has them",
        choices=("all", "owned", "shares"),
    )  # fmt: skip
    drop_class0_bug: bool = knob(False, "leave class 0 out of the real batches, as the authors' code does (G1)")
    gan_augment: bool = knob(False, "train on augmented (cropped, flipped) images (D12)")
    diff_augment: bool = knob(
        False, "DiffAugment: change the images of a GAN at random before the discriminator sees them"
    )
    conditional: bool = knob(False, "another way to ask for generator.family = cgan")
    latent_dim: int = knob(100, "size of z", low=1, high=1_000_000)
    ngf: int = knob(64, "generator channels", low=1, high=4096)
    ndf: int = knob(64, "discriminator channels", low=1, high=4096)
    steps: int = knob(800, "steps per client; 0: the untrained network; unused when epochs > 0", low=0)
    epochs: int = knob(0, "passes over the client's data; 0: use steps", low=0)
    batch_size: int = knob(64, "images per step; with condensed, of each class", low=1, high=1_000_000)
    images_per_class: int = knob(50, "condensed images of each class", low=1, high=100_000)
    least_images: int = knob(
        50, "images of a class that a client must have to condense it; of very few they would be copies", low=1
    )  # fmt: skip
    matching_channels: int = knob(
        32, "channels of the random networks in which condensed images match real ones", low=1, high=4096
    )  # fmt: skip
    matching_global: float = knob(
        0.5, "share of the steps in which they match in the global model's features instead", low=0.0, high=1.0
    )  # fmt: skip
    image_scale: int = knob(
        2, "sides of an image over those that a condensed one is stored with; it is enlarged bilinearly", low=1, high=64
    )  # fmt: skip
    feature_weight: float = knob(
        0.0, "weight of the reconstruction loss in the feature space of the global model, with cvae; 0: pixels alone",
        low=0.0,
    )  # fmt: skip
    lr: float = knob(
        0.0, "Adam learning rate; 0: 2e-4 for both players of a GAN, 2e-3 for cvae, 0.05 for condensed", low=0.0
    )  # fmt: skip
    beta1: float = knob(0.5, "Adam beta1", low=0.0, high=0.9999)
    beta2: float = knob(0.999, "Adam beta2", low=0.0, high=0.99999)

    @property
    def labelled(self) -> bool:
        """Whether the generator takes the label of the image to draw."""
        return self.conditional or self.family != "dcgan"

    @property
    def learning_rate(self) -> float:
        """``lr``, or the family's own where that is 0."""
        return self.lr or {"cvae": 2e-3, "condensed": 0.05}.get(self.family, 2e-4)


@dataclass(frozen=True)
class PrototypesConfig:
    """The centroids of features that clients send."""

    k: int = knob(10, "centroids per class and client", low=1)
    model: str = knob("global", "the model that computes the features (P1)", choices=("global", "client"))
    rounds: str = knob("last", "upload once, or after every warm-up round and keep all (P3)", choices=("last", "all"))
    samples: int = knob(0, "samples used; 0: all the client's", low=0)
    augment: bool = knob(False, "on augmented images (P1)")
    weighting: str = knob("size", "weight of a centroid in meta training (P4)", choices=("size", "uniform"))
    cap: int = knob(0, "centroids per class that are sent; 0: all (P2: the authors' code sends 10)", low=0)
    held_out: float = knob(0.25, "share kept from training to choose head, teacher and student", low=0.0, high=0.9)
    split: str = knob(
        "halves",
        "what is held out: centroids, or a share of each client's images of a class, which get centroids of their own",
        choices=("cells", "halves"),
    )
    subsets: str = knob(
        "held", "sets of a sample's modalities whose features are taken: all that it has, or each set of these",
        choices=("held", "all"),
    )  # fmt: skip

    @property
    def judging(self) -> float:
        """Return the share of a class's images that a client keeps for choices; 0 where the server draws centroids."""
        return self.held_out if self.split == "halves" else 0.0


@dataclass(frozen=True)
class MetaConfig:
    """The meta model, which weighs the experts."""

    expert_fallback: str = knob(
        "global", "a class that nobody owns: the global model, or an error (F2)", choices=("global", "error")
    )
    input: str = knob("head", "what the experts show the meta model (M6)", choices=("head", "full"))
    tokens: str = knob(
        "expert", "what one token of the meta model is: an expert, or an expert and a modality (model.fusion=late)",
        choices=("expert", "modality"),
    )  # fmt: skip
    data: str = knob(
        "prototypes",
        "training data: prototypes, or synthetic images labelled by their client's model or by the experts' vote",
        choices=("prototypes", "synthetic", "synthetic_vote"),
    )
    pool: str = knob("mean", "pooling over experts (M5)", choices=("mean", "sum"))
    expert_embedding: bool = knob(True, "add an embedding of the expert to its token (M3)")
    init: str = knob(
        "prototype_head", "start at random, or at a head re-fitted on prototypes", choices=("random", "prototype_head")
    )
    token_dim: int = knob(
        0, "size of an expert's token; 0: ten per class, at most 200; -1: ten per class and as many heads",
        low=-1, high=100_000,
    )  # fmt: skip
    feedforward: int = knob(2048, "hidden size of the transformer's feed-forward part", low=1, high=1_000_000)
    dropout: float = knob(0.2, "dropout", low=0.0, high=0.95)
    updates: int = knob(500, "optimiser updates", low=0)
    batch_size: int = knob(128, "prototypes per update", low=1, high=1_000_000)
    lr: float = knob(1e-3, "Adam learning rate", above=0.0)
    ema: float = knob(0.99, "decay of the averaged copy that teaches", low=0.0, high=0.99999)
    ema_bias_correction: bool = knob(True, "take the random start out of the average (M2)")
    select: bool = knob(True, "keep the state that is best on held-out prototypes; off: the last one")
    patience: int = knob(200, "updates without a better state before training stops, with select; 0: never", low=0)


@dataclass(frozen=True)
class DistillConfig:
    """Distillation into the global model."""

    steps: int = knob(
        300, "distillation steps; 0: no teacher, and the closing rounds begin at the warm-up's model", low=0
    )
    start: str = knob(
        "refit", "the head that the student starts with: the global model's, or one re-fitted on prototypes",
        choices=("global", "refit"),
    )  # fmt: skip
    lr: float = knob(1e-3, "Adam learning rate of the head", above=0.0)
    backbone_lr: float = knob(0.0, "Adam learning rate below the head; 0 freezes it", low=0.0)
    samples_per_generator: int = knob(32, "synthetic images per generator and step, on average", low=1, high=1_000_000)
    gen_sampling: str = knob(
        "quality", "share of each generator in a batch (K4)", choices=("uniform", "proportional", "quality", "covered")
    )
    temperature: float = knob(1.0, "T", above=0.0)
    soft_weight: float = knob(0.8, "alpha: weight of KL, with 1 - alpha on the hard label", low=0.0, high=1.0)
    js_weight: float = knob(1.0, "beta: weight of the Jensen-Shannon term", low=0.0)
    jsd: str = knob("true", "which divergence that term is (K1)", choices=("true", "bhattacharyya"))
    label_weight: float = knob(
        0.0, "share of the label that a generator was asked for in the target of its image; the rest is the teacher's",
        low=0.0, high=0.99,
    )  # fmt: skip
    modality_dropout: float = knob(
        0.0, "chance that the student does not see a modality of a synthetic sample, of which the teacher sees all",
        low=0.0, high=0.9,
    )  # fmt: skip
    student_bn: str = knob("frozen", "batch-norm statistics during distillation (K2)", choices=("frozen", "train"))
    anchor_weight: float = knob(1.0, "weight of the head's cross-entropy on prototypes", low=0.0)
    confidence: float = knob(0.0, "synthetic images below this teacher confidence are left out", low=0.0, high=1.0)
    class_balance: bool = knob(True, "weight synthetic images so that the teacher's classes count alike")
    guard: bool = knob(True, "never hand back a student worse on held-out prototypes than the one that went in")
    check_steps: int = knob(25, "steps between looks at held-out prototypes", low=1)
    workers: int | str = knob(
        "auto", "Ray Train workers; 0: in the server's process; auto: one where clients train on GPUs of Ray, else 0",
        low=0, high=64,
    )  # fmt: skip

    @property
    def train_workers(self) -> int:
        """Return ``workers``; 0 while it is ``auto``."""
        return 0 if isinstance(self.workers, str) else self.workers

    @property
    def moves_features(self) -> bool:
        """Whether the student's features change, so that prototypes no longer describe them."""
        return self.backbone_lr > 0 or self.student_bn == "train"

    @property
    def looks(self) -> int:
        """Return how many states the guard compares, the first and the last included."""
        return 1 + -(-self.steps // self.check_steps)


@dataclass(frozen=True)
class FinetuneConfig:
    """The closing federated rounds."""

    num_rounds: int = knob(3, "closing federated rounds", low=0)
    lr: float = knob(1e-4, "SGD learning rate", above=0.0)
    lr_decay: float = knob(1.0, "factor of the learning rate after each round", above=0.0, high=1.0)
    local_steps: int = knob(10, "optimiser steps per client and round", low=1)
    freeze_head: bool = knob(False, "keep the student's head fixed meanwhile")
    adapt_steps: int = knob(
        0, "optimiser steps by which each client adapts the final model, for reporting alone; 0: none", low=0
    )
    bn: str = knob(
        "frozen",
        "batch-norm statistics in the closing rounds: those that prototypes and head were made with, running ones, or "
        "running ones and at the end exact ones of all clients' images",
        choices=("frozen", "running", "exact"),
    )
    head: str = knob(
        "keep",
        "the student's head after the closing rounds: as trained, or made anew from clients' statistics of the new "
        "features; refit: as the method makes its head, else lda_head",
        choices=("keep", "refit", "lda_head", "ccvr", "prototype_head"),
    )


@dataclass(frozen=True)
class RehearsalConfig:
    """Synthetic images in clients' training."""

    weight: float = knob(
        0.0, "weight of the loss on synthetic images in the student's closing rounds; 0: no rehearsal", low=0.0
    )
    begins: str = knob(
        "closing", "the rounds with rehearsal: the closing ones, or the warm-up's as well, for which generators are "
        "trained first", choices=("closing", "warmup"),
    )  # fmt: skip
    ratio: float = knob(1.0, "synthetic images for each real one", above=0.0, high=16.0)
    classes: str = knob(
        "lacking", "classes drawn: those of which a client holds less than a tenth of an equal share, or all",
        choices=("lacking", "all"),
    )  # fmt: skip
    modalities: str = knob(
        "joined", "modalities of a synthetic sample: each from a generator that has it, drawn independently given the "
        "class, or all from one generator", choices=("joined", "single"),
    )  # fmt: skip
    candidates: tuple[float, ...] = knob(
        (), "weights tried beside 0: clients' held-back images choose one, in place of weight; a method without "
        "generators has none to try", above=0.0,
    )  # fmt: skip
    trial_rounds: int = knob(5, "rounds of each trial", low=1)
    held_back: float = knob(
        0.1, "share of each client's images of a class that judges the trials and is not trained on in them",
        above=0.0, high=0.5,
    )  # fmt: skip


@dataclass(frozen=True)
class StudentConfig:
    """Training of ``model.student``."""

    steps: int = knob(1500, "steps of model.student", low=1)
    batch_size: int = knob(64, "synthetic images per step", low=2, high=1_000_000)
    lr: float = knob(0.05, "SGD learning rate at the start; it falls to 0 along a cosine", above=0.0)
    label_weight: float = knob(
        0.5, "weight of the label that a generator was asked for, against the final model's prediction", low=0.0,
        high=1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how a run computes."""

    host: str = knob("ray", "where clients run", choices=("ray", "serial"))
    cpus_per_client: float = knob(1.0, "CPUs of a client actor; threads follow", above=0.0)
    device: str = knob(
        "auto", "where clients train; auto: on GPUs where there are any, else on CPUs", choices=("auto", "cpu", "cuda")
    )
    gpus_per_client: float | str = knob(
        "auto", "GPU share of a client actor; auto: as many clients a GPU as its memory holds; 0: CPUs", low=0.0
    )
    clients_per_batch: int | str = knob(
        1,
        "most clients of one network that are trained together, with their weights stacked; above 1 the last bits of "
        "results differ; auto: 8 where small networks are trained on GPUs, else 1",
        low=1,
    )
    cuda_graphs: bool = knob(
        False, "plain local training on a GPU records a client's step once a round and replays it; same bits"
    )
    max_hosts: int = knob(0, "client actors at once; 0: as many as fit", low=0)
    client_timeout: float = knob(
        0.0,
        "seconds without a sign of life after which the process of a client or of the server's work is killed and its "
        "work done again; 0: 20 times the longest silence of this run, at least 120; -1: never",
        low=-1.0,
    )
    driver_threads: int = knob(
        1, "torch threads of the driver and of Train workers; results depend on it in the last bit", low=1
    )
    precision: str = knob(
        "auto", "auto: bf16 where the processor has it natively, else fp32", choices=("auto", "fp32", "bf16")
    )
    deterministic: bool = knob(True, "GPUs give the same bits in every run; off: faster (docs/RELIABILITY.md)")
    eval_rounds: int = knob(5, "rounds between looks at the test set, for curves only; 0: never", low=0)
    eval_samples: int = knob(2000, "test images in those looks; the closing table uses all", low=1)
    ceiling: bool = knob(
        False, "report a linear probe of the warmed-up model; it reads all clients' images, and no choice follows it"
    )

    @property
    def gpu_share(self) -> float:
        """Return ``gpus_per_client``; 0 while it is ``auto``."""
        return 0.0 if isinstance(self.gpus_per_client, str) else self.gpus_per_client


@dataclass(frozen=True)
class ExperimentConfig:
    """The configuration of one experiment."""

    method: str = knob("mosaic", "see `mosaic methods`; or module:object of your own")
    algorithm: str = knob("distilled", "algorithm preset", choices=("fixed", "distilled", "paper", "reference"))
    seed: int = knob(0, "one seed for everything", low=0, high=2**31 - 6000)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    #: Methods' and strategies' own knobs that differ from their defaults, as sorted (dotted name, value).
    extra: tuple[tuple[str, Any], ...] = ()
    #: The scale preset that the knobs began with, and the line that says why it was chosen; they are no knobs, and no
    #: part of keys, names and comparisons.
    preset: str = field(default="", compare=False)
    reason: str = field(default="", compare=False)

    @property
    def schedule(self) -> str:
        """Return the line about the schedule for a dry run."""
        return self.reason or f"schedule {self.preset or 'of the file'}"
