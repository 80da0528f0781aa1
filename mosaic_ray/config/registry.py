"""The names of data sets, strategies, networks and methods, with one line on each; loads nothing heavy."""

from __future__ import annotations

from typing import NamedTuple

#: Data sets by name, with what `mosaic` says of them. Facts that need arrays live in ``data.specs``.
DATASETS: dict[str, str] = {
    "digits": "scikit-learn's handwritten digits: 1,797 images of 8x8, bundled",
    "mnist": "MNIST: 60,000 + 10,000 images of 28x28",
    "fmnist": "Fashion-MNIST: 60,000 + 10,000 images of 28x28",
    "svhn": "Street View House Numbers: 73,257 + 26,032 colour images of 32x32, 10 classes",
    "cifar10": "CIFAR-10: 50,000 + 10,000 colour images of 32x32, 10 classes",
    "cifar100": "CIFAR-100: 50,000 + 10,000 colour images of 32x32, 100 classes",
    "tiny_imagenet": "Tiny-ImageNet: 100,000 + 10,000 colour images of 64x64, 200 classes",
    "food101": "Food-101: 75,750 + 25,250 colour photographs, 101 classes; drawn at 64x64",
}


class Entry(NamedTuple):
    """One line on a method or a strategy, and the object that implements it, as ``module:object``."""

    summary: str
    target: str


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
        "generators, class experts and a meta model teach the student (arXiv 2505.19699)",
        "mosaic_ray.methods.mosaic.method:MOSAIC",
    ),
    "prototype_head": Entry(
        "ablation: the head re-fitted on prototypes, no synthetic image",
        "mosaic_ray.methods.prototype_head:PROTOTYPE_HEAD",
    ),
    "fedavg": Entry("the warm-up and the closing rounds alone", "mosaic_ray.methods.base:NONE"),
}
