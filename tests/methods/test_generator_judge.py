"""The calibrated judge of generators: the global model with an LDA head, the same one for all clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FACTS, TINY, stripes_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.config.validate import check
from mosaic_ray.core.errors import RequestError
from mosaic_ray.distillation.generator_training import evaluate_generator, load_generator
from mosaic_ray.models.classifiers import build_classifier
from mosaic_ray.models.state_dict import freeze, load_weights
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store

JUDGED = {"generator.judge": "calibrated", "generator.family": "cgan", "generator.steps": 6, "distill.steps": 2}

FEWEST = {"generator__least_images": 1}  # clients here have some dozens of images
#: A variational autoencoder refuses TINY's knobs of a GAN.
WITHOUT_GAN = {"generator__tau": 300}


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(folder: Path, **knobs: Any) -> dict[str, Any]:
    config = override(TINY, JUDGED | {name.replace("__", "."): value for name, value in knobs.items()})
    return runner.run(check(config), storage=str(folder), progress=False)


@pytest.mark.parametrize("family", ["cgan", "cvae", "condensed", "dcgan"])
def test_the_judge_measures_what_generators_show(tmp_path, family):
    knobs = {} if family.endswith("gan") else WITHOUT_GAN | (FEWEST if family == "condensed" else {})
    found = go(tmp_path, generator__family=family, **knobs)
    store, keys = Store(str(tmp_path)), {name: stage["key"] for name, stage in found["stages"].items()}
    assert list(keys).index("judge") < list(keys).index("generators")
    assert found["communication"]["measured_over_predicted"] == 1
    config = override(TINY, JUDGED | {"generator.family": family})
    network = build_classifier(config.model, FACTS.num_classes, FACTS.channels, FACTS.image_size)
    judge = freeze(load_weights(network, store.get(keys["judge"]).load("global")))
    shown = 0
    for path in sorted(tmp_path.glob("objects/generator*/manifest.json")):
        made = store.get(path.parent.name)
        generator = load_generator(config.generator, FACTS, made.load("generator"))
        for client_id, counts in enumerate(found["label_counts"]):
            figures, _ = evaluate_generator(
                generator, judge, torch.tensor(counts), config.generator, FACTS, (config.seed, client_id)
            )
            shown += all(made.facts["figures"][name] == value for name, value in figures.items())
    assert shown == TINY.partition.num_clients


def test_it_steers_the_generators_and_shares_its_head_with_lda_head(tmp_path):
    own, judged = go(tmp_path, generator__judge="client"), go(tmp_path)
    assert own["stages"]["generators"]["key"] != judged["stages"]["generators"]["key"]
    store = Store(str(tmp_path))
    weights = [store.get(path.parent.name).load("generator")
               for path in sorted(tmp_path.glob("objects/generator*/manifest.json"))]  # fmt: skip
    assert len({w["layers.0.weight"].tobytes() for w in weights}) == len(weights) == 2 * TINY.partition.num_clients
    floor = go(tmp_path, method="lda_head", generator__judge="client")
    assert floor["stages"]["class_statistics"]["cached"]
    assert floor["stages"]["distill"]["key"] == judged["stages"]["judge"]["key"]


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"generator.stage": "before"}, "it takes generator.stage=after_warmup"),
        ({"generator.classifier_source": "fresh"}, "generator.classifier_source=client"),
        ({"federation.strategy": "fedrolex", "federation.widths": (1.0, 0.5, 0.5)}, "no feature space in common"),
    ],
)
def test_it_needs_one_feature_space_and_a_warmed_up_model(knobs, words):
    with pytest.raises(RequestError, match=words):
        check(override(TINY, JUDGED | knobs))
