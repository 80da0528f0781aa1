"""The names of data sets, strategies, networks, methods, statuses, with one line on each; loads nothing heavy."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One line on a data set, a method or a strategy, and the object that implements it, as ``module:object``."""

    summary: str
    target: str


#: Data sets that ship, by name; each target is a ``data.specs.DatasetSpec``.
DATASETS: dict[str, Entry] = {
    "digits": Entry(
        "scikit-learn's handwritten digits: 1,797 images of 8x8, bundled", "mosaic_ray.data.array_sources:DIGITS"
    ),
    "mnist": Entry("MNIST: 60,000 + 10,000 images of 28x28", "mosaic_ray.data.array_sources:MNIST"),
    "fmnist": Entry("Fashion-MNIST: 60,000 + 10,000 images of 28x28", "mosaic_ray.data.array_sources:FASHION_MNIST"),
    "svhn": Entry(
        "Street View House Numbers: 73,257 + 26,032 colour images of 32x32, 10 classes",
        "mosaic_ray.data.array_sources:SVHN",
    ),
    "cifar10": Entry(
        "CIFAR-10: 50,000 + 10,000 colour images of 32x32, 10 classes", "mosaic_ray.data.array_sources:CIFAR10"
    ),
    "cifar100": Entry(
        "CIFAR-100: 50,000 + 10,000 colour images of 32x32, 100 classes", "mosaic_ray.data.array_sources:CIFAR100"
    ),
    "tiny_imagenet": Entry(
        "Tiny-ImageNet: 100,000 + 10,000 colour images of 64x64, 200 classes",
        "mosaic_ray.data.image_sources:TINY_IMAGENET",
    ),
    "food101": Entry(
        "Food-101: 75,750 + 25,250 colour photographs, 101 classes; drawn at 64x64",
        "mosaic_ray.data.image_sources:FOOD101",
    ),
    "mfeat": Entry(
        "UCI Multiple Features: 1,500 + 500 handwritten digits in six views, each a list of numbers, 10 classes",
        "mosaic_ray.data.modality_sources:MFEAT",
    ),
}

#: Data sets that ship whose samples have several modalities.
MULTIMODAL = ("mfeat",)

#: Data sets that lie at a path or below the data root: prefix of ``data.name`` -> module:function of the loader.
DATASET_PREFIXES = {
    "folder": "mosaic_ray.data.image_sources:folder",
    "parquet": "mosaic_ray.data.modality_sources:parquet",
    "hf": "mosaic_ray.data.hub:hub",
    "imported": "mosaic_ray.data.image_cache_build:imported",
}

#: Samplers that deal images as a file of rows (``file:PATH``) or a column of the data set (``natural:COLUMN``) says.
SAMPLER_PREFIXES = ("file", "natural")


def sampler_kind(sampler: str) -> str:
    """Return ``file`` or ``natural``, ``plugin`` for user code, or "" for a sampler that ships."""
    prefix, colon, _ = sampler.partition(":")
    return "" if not colon else prefix if prefix in SAMPLER_PREFIXES else "plugin"


#: Federated strategies by name; ``federated/strategies/base.py`` has their contract. Names joined by ``+`` combine.
STRATEGIES: dict[str, Entry] = {
    "fedavg": Entry(
        "weighted averaging of whole models (McMahan et al. 2017)", "mosaic_ray.federated.strategies.base:FEDAVG"
    ),
    "fedrolex": Entry(
        "parts of models, a window that rolls by a channel a round (Alam et al. 2022)",
        "mosaic_ray.federated.strategies.submodel:FEDROLEX",
    ),
    "heterofl": Entry(
        "parts of models, always the first channels (Diao et al. 2021)",
        "mosaic_ray.federated.strategies.submodel:HETEROFL",
    ),
    "feddropout": Entry(
        "parts of models, channels drawn at random (Caldas et al. 2018)",
        "mosaic_ray.federated.strategies.submodel:FEDDROPOUT",
    ),
    "fedprox": Entry(
        "a proximal term in the local objective (Li et al. 2020)", "mosaic_ray.federated.strategies.fedprox:FEDPROX"
    ),
    "scaffold": Entry(
        "control variates take out the clients' drift (Karimireddy et al. 2020)",
        "mosaic_ray.federated.strategies.scaffold:SCAFFOLD",
    ),
    "fedbn": Entry(
        "batch norms stay with the clients (Li, Jiang et al. 2021)", "mosaic_ray.federated.strategies.fedbn:FEDBN"
    ),
    "fedrs": Entry(
        "restricted softmax: logits of missing classes scaled down (Li and Zhan 2021)",
        "mosaic_ray.federated.strategies.fedrs:FEDRS",
    ),
    "fedlc": Entry(
        "logits calibrated by a client's label counts (Zhang et al. 2022)",
        "mosaic_ray.federated.strategies.fedlc:FEDLC",
    ),
    "moon": Entry(
        "features pulled to the global model's, from the last local one's (Li, He and Song 2021)",
        "mosaic_ray.federated.strategies.moon:MOON",
    ),
    "ditto": Entry(
        "FedAvg, and a personal model at every client (Li, Hu et al. 2021)",
        "mosaic_ray.federated.strategies.ditto:DITTO",
    ),
    "pmcmfl": Entry(
        "class prototypes stand in for absent modalities (Bao et al. 2023)",
        "mosaic_ray.federated.strategies.pmcmfl:PMCMFL",
    ),
    "local": Entry("no averaging before the end: clients train alone", "mosaic_ray.federated.strategies.local:LOCAL"),
}

#: Networks by name; ``models.classifiers`` builds them.
CLASSIFIERS: dict[str, str] = {
    "cnn": "six 3x3 convolutions with batch norm",
    "resnet18": "ResNet-18 with the CIFAR stem (He et al. 2016)",
    "resnet34": "ResNet-34 with the CIFAR stem",
    "resnet50": "ResNet-50 with the CIFAR stem",
    "mobilenet": "inverted residuals of depthwise convolutions, a sixth of resnet18's weights (Sandler et al. 2018)",
}

#: Methods by name; ``methods/base.py`` has their contract.
METHODS: dict[str, Entry] = {
    "mosaic": Entry(
        "generators for rehearsal, or with class experts and a meta model to teach the student (arXiv 2505.19699)",
        "mosaic_ray.methods.mosaic.method:MOSAIC",
    ),
    "prototype_head": Entry(
        "ablation: the head re-fitted on prototypes, no synthetic image",
        "mosaic_ray.methods.prototype_head:PROTOTYPE_HEAD",
    ),
    "lda_head": Entry(
        "ablation: the head of linear discriminant analysis, from sums that clients send",
        "mosaic_ray.methods.statistics_heads:LDA_HEAD",
    ),
    "ccvr": Entry(
        "ablation: the head trained on features drawn from one Gaussian a class (Luo et al. 2021)",
        "mosaic_ray.methods.statistics_heads:CCVR",
    ),
    "dense": Entry(
        "images on which the clients' models agree and the student does not (Zhang et al. 2022)",
        "mosaic_ray.methods.dense:DENSE",
    ),
    "co_boosting": Entry(
        "DENSE with hard images and learnt weights of the clients' models (Dai et al. 2024)",
        "mosaic_ray.methods.co_boosting:CO_BOOSTING",
    ),
    "fedftg": Entry(
        "the server fine-tunes the model after every round, on a generator's images (Zhang et al. 2022)",
        "mosaic_ray.methods.fedftg:FEDFTG",
    ),
    "dfrd": Entry(
        "as FedFTG, with one ensemble and a memory of the generator (Luo et al. 2023)", "mosaic_ray.methods.dfrd:DFRD"
    ),
    "fedcvae": Entry(
        "the server trains on labelled images of the clients' decoders (Heinbaugh et al. 2023)",
        "mosaic_ray.methods.fedcvae:FEDCVAE",
    ),
    "fens": Entry(
        "NOT DATA-FREE: the clients' models and a gate that their real images train (Allouah et al. 2024)",
        "mosaic_ray.methods.fens:FENS",
    ),
    "centralised": Entry(
        "NOT FEDERATED: an upper bound, trained on all images in one place",
        "mosaic_ray.methods.centralised:CENTRALISED",
    ),
    "fedavg": Entry("the warm-up and the closing rounds alone", "mosaic_ray.methods.base:NONE"),
}

#: Trackers of other projects, by name of option, module and extra (``tracking.backends``).
TRACKERS = ("wandb", "mlflow", "trackio")

#: Statuses of runs. running: its process holds the lease. interrupted: neither that nor a summary. damaged: its files
#: are not what a run writes.
STATUSES = ("running", "done", "failed", "stopped", "interrupted", "damaged")
