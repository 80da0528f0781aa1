"""What is fixed of each data set, and the form in which loaders hand one over."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import DataFacts, ImageSet

_COLOUR = ("crop", "flip")
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

#: In its own size and channels, whether or not its files are there. Digits' moments were measured on the 1,437 training
#: images; the others' are the authors' (ALGORITHM §1.2): MNIST's for Fashion-MNIST too, CIFAR-100's for Food-101,
#: ImageNet's for Tiny-ImageNet. A mirrored digit is another sign or none, so digits are not flipped, SVHN's neither
#: (D10).
KNOWN = {
    facts.name: facts
    for facts in (
        DataFacts("digits", 10, 1, 8, (0.3051,), (0.3759,)),
        DataFacts("mnist", 10, 1, 28, (0.1307,), (0.3081,)),
        DataFacts("fmnist", 10, 1, 28, (0.1307,), (0.3081,)),
        DataFacts("svhn", 10, 3, 32, (0.5,) * 3, (0.5,) * 3, ("crop",)),
        DataFacts("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _COLOUR),
        DataFacts("cifar100", 100, 3, 32, *_CIFAR100, _COLOUR),
        DataFacts("tiny_imagenet", 200, 3, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), _COLOUR),
        DataFacts("food101", 101, 3, 64, *_CIFAR100, _COLOUR),
    )
}


@dataclass(frozen=True)
class Raw:
    """A data set as its loader has it; the size and the channels that were asked for may still be other ones.

    ``mean`` and ``std`` as in ``DataFacts``. ``content`` is a digest of both parts where the loader has one already.
    """

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentations: tuple[str, ...]
    content: str = ""


def known(name: str, train: ImageSet, test: ImageSet, class_names: tuple[str, ...]) -> Raw:
    """``Raw`` with the constants of the data set ``name``."""
    facts = KNOWN[name]
    return Raw(train, test, class_names, facts.mean, facts.std, facts.augmentations)
