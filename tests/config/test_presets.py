"""The rule by which every data set has two schedules, from its shape and the number of clients."""

from __future__ import annotations

import dataclasses

import pytest

from mosaic_ray.config.presets import (
    CLIENTS,
    GENERIC,
    LEAST_BATCH,
    LEAST_GENERATOR_STEPS,
    LEAST_STEPS,
    PASSES,
    SCALES,
    SHAPES,
    Shape,
    preset_knobs,
    schedule,
)  # fmt: skip
from mosaic_ray.config.registry import DATASETS
from mosaic_ray.config.resolve import flatten, override, resolve
from mosaic_ray.data.array_sources import digits
from mosaic_ray.data.specs import spec_of
from mosaic_ray.runs.runner import default_name


def test_the_shapes_are_those_of_the_data_sets():
    assert SHAPES.keys() == DATASETS.keys()
    for name, shape in SHAPES.items():
        facts = spec_of(name).facts
        assert shape[:3] == (facts.num_classes, facts.channels, facts.image_size), name
        if name != "digits":
            assert f"{shape.images:,} + " in DATASETS[name].summary
    assert SHAPES["digits"].images == len(digits(resolve().data).train)


def test_every_data_set_has_two_schedules_of_its_own():
    assert set(SCALES) == {"demo", *DATASETS, *(f"{name}_small" for name in DATASETS)}
    for name in DATASETS:
        small, large = resolve(f"{name}_small"), resolve(name)
        assert (small.data.name, large.data.name) == (name, name)
        assert (small.partition.num_clients, large.partition.num_clients) == (CLIENTS, CLIENTS)
        assert (small.model.classifier, large.model.classifier) == ("cnn", "resnet18")
        assert (small.preset, large.preset) == (f"{name}_small", name)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("large", [False, True])
def test_named_schedules_follow_the_rule(name, large):
    knobs = dict(SCALES[name if large else f"{name}_small"].knobs)
    assert knobs.pop("data.name") == name
    expected = schedule(SHAPES[name], large)
    assert knobs == (expected | {"warmup.num_rounds": 100} if (name, large) == ("mnist", True) else expected)


@pytest.mark.parametrize("shape, side", [((10, 1, 8), 0), ((10, 1, 28), 0), ((9, 3, 96), 32), ((9, 3, 0), 32)])
def test_photographs_are_read_at_32_pixels(shape, side):
    small, large = (resolve(word, shape=Shape(*shape)) for word in GENERIC)
    assert (small.data.image_size, small.data.channels) == (side, 0)
    assert (large.data.image_size, large.data.channels or shape[1]) == (32, 3)


def test_many_classes_have_more_local_steps():
    few, many = (resolve("small", shape=Shape(classes, 3, 32, 50_000)).warmup for classes in (10, 11))
    assert (few.num_rounds, few.local_steps, many.num_rounds, many.local_steps) == (60, 10, 30, 20)
    few, many = (resolve("large", shape=Shape(classes, 3, 32, 50_000)) for classes in (10, 11))
    assert (few.warmup.num_rounds, many.warmup.num_rounds, many.prototypes.k) == (341, 1041, 60)
    assert resolve("large+reference", shape=Shape(11, 3, 32)).distill.lr == 1e-5


def test_r1_to_r5_the_authors_numbers_are_those_of_their_own_algorithms():
    """docs/algorithm.md, section 9: prototypes, distillation and closing rounds of ``paper`` and ``reference``."""
    for algorithm in ("paper", "reference"):
        for scale in SCALES:
            prototypes = resolve(f"{scale}+{algorithm}").prototypes
            assert (prototypes.held_out, prototypes.weighting) == (0, "uniform"), scale
        steps = {name: resolve(f"{name}+{algorithm}").distill.steps for name in ("mnist", "fmnist", "svhn", "cifar10")}
        assert steps == {"mnist": 1500, "fmnist": 1500, "svhn": 2500, "cifar10": 2500}
        for clients, local_steps in ((10, 20), (20, 10)):
            config = resolve(f"cifar100+{algorithm}", sets={"partition.num_clients": str(clients)})
            assert config.finetune.local_steps == config.warmup.local_steps == local_steps
    samples = {name: resolve(f"{name}+reference").prototypes.samples for name in ("cifar10", "cifar100")}
    assert samples == {"cifar10": 640, "cifar100": 1280}
    ours = resolve("cifar100+distilled")
    assert (ours.distill.steps, ours.finetune.local_steps, ours.prototypes.samples) == (300, 10, 0)
    assert ours.prototypes.held_out > 0


def work(preset: str, clients: int | None = None, **sets: str) -> dict[str, float]:
    """The knobs that shrink with the clients' images."""
    given = {"partition.num_clients": str(clients)} if clients else {}
    config = resolve(preset, sets=given | {name.replace("__", "."): value for name, value in sets.items()})
    names = (
        "warmup.local_steps", "finetune.local_steps", "generator.steps", "warmup.batch_size", "generator.batch_size",
        "distill.samples_per_generator",
    )  # fmt: skip
    return {name: flatten(config)[name] for name in names}


def test_a_local_epoch_stays_as_long_where_clients_have_fewer_images():
    ten, twenty, hundred = (work("cifar100_small", clients) for clients in (10, 20, 100))
    assert ten == work("cifar100_small") and ten["warmup.local_steps"] == 20
    assert list(twenty.values()) == [10, 5, 200, 64, 64, 16]
    assert list(hundred.values()) == [LEAST_STEPS, LEAST_STEPS, LEAST_GENERATOR_STEPS, 64, 64, 3]
    assert work("cifar100_small", 5) == ten, "fewer and larger clients work as they do in the schedule"
    assert work("fmnist_small", 12) == work("fmnist_small") | {"distill.samples_per_generator": 27}
    assert work("cifar100_small", 100, warmup__local_steps="7")["warmup.local_steps"] == 7
    assert work("cifar10", 100)["generator.steps"] == 800, "its generators train for epochs"


def test_a_small_warm_up_ends_after_so_many_passes():
    for name, clients, rounds in (("digits_small", 10, 11), ("cifar100_small", 200, 20), ("cifar10_small", 70, 56)):
        knobs = resolve(name, sets={"partition.num_clients": str(clients)}).warmup
        assert knobs.num_rounds == rounds
        passes = rounds * knobs.local_steps * knobs.batch_size * clients / SHAPES[name.removesuffix("_small")].images
        assert passes == pytest.approx(PASSES, abs=1.2)
    assert resolve("digits").warmup.num_rounds == 200


def test_a_batch_is_not_larger_than_a_client():
    assert work("digits_small", 40)["warmup.batch_size"] == 36
    assert work("digits_small", 1000)["generator.batch_size"] == LEAST_BATCH
    assert work("demo", 100) == work("demo"), "the demo's schedule is fixed"


def test_unknown_numbers_of_images_count_as_cifars():
    assert schedule(Shape(10, 3, 32), False, 50) == schedule(SHAPES["cifar10"], False, 50)
    assert preset_knobs("small", shape=Shape(10, 3, 32, 2000))["warmup.local_steps"] == LEAST_STEPS


def test_a_recorded_preset_changes_neither_equality_nor_names():
    config = resolve("cifar10_small")
    other = dataclasses.replace(config, preset="demo")
    assert other == config and hash(other) == hash(config)
    assert default_name(other) == default_name(config)
    assert override(config, {"seed": 3}).preset == "cifar10_small"


def test_fixed_does_less_where_images_have_colour():
    grey, colour, distilled = (resolve(name) for name in ("fmnist_small", "cifar10_small", "cifar10_small+distilled"))
    assert (grey.finetune.num_rounds, colour.finetune.num_rounds) == (30, 12)
    assert (colour.generator.steps, distilled.generator.steps) == (400, 800)
    many = resolve("cifar10_small", sets={"partition.num_clients": "1000"})
    assert (many.finetune.num_rounds, many.generator.steps) == (10, LEAST_GENERATOR_STEPS)
