"""docs/METHODS.md lists every method, and its costs are those that the code counts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic_ray.config.plugins import load
from mosaic_ray.config.registry import METHODS
from mosaic_ray.config.resolve import override, resolve
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.data.load import known_facts
from mosaic_ray.distillation.ensemble import Ensemble, learn_labels, take_turns, teach_from_pool
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.methods.dfrd import DfrdGame, DfrdKnobs
from mosaic_ray.methods.fedcvae import FedCvaeKnobs, draw_images
from mosaic_ray.methods.fedftg import FedFtgGame, FedFtgKnobs
from mosaic_ray.methods.server_side import PoolMethod
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.runs.communication import predicted
from mosaic_ray.runs.equal_compute import client_costs, client_steps, operations

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "METHODS.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
    for cells in (line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| `\w+` \| [\d,]+ \|", line))
}
#: Methods whose count takes a minute.
LONG = ("dense", "co_boosting", "dfrd")
#: Methods whose stages these pages' costs cover; of Mosaic and its ablations docs/algorithm.md has the rest.
COUNTED = ("fedavg", "dense", "co_boosting", "fedftg", "dfrd", "fedcvae", "fens", "centralised")


def config_of(method: str) -> ExperimentConfig:
    family = {"generator.family": "cvae"} if method == "fedcvae" else {}
    plain = {"runtime.precision": "fp32", "runtime.device": "cpu"}
    return override(resolve("demo+distilled"), {"method": method} | plain | family)


def test_every_method_is_on_the_page():
    first: dict[str, str] = {}
    for line in PAGE.splitlines():
        for name in re.findall(r"^\| `(\w+)` \|", line):
            first.setdefault(name, line)
    assert first.keys() >= set(METHODS)
    assert "not federated" in first["centralised"] and "not data-free" in first["fens"]


def server_steps(method: str) -> int:
    """The server's operations, over those of one SGD step of a client."""
    config = config_of(method)
    facts = known_facts(config.data)
    context = ClientContext(config, facts, torch.device("cpu"))
    everyone, start = config.partition.num_clients, initial_weights(context)
    step = client_costs(config, facts)[1] / everyone
    clients, counts = dict.fromkeys(range(everyone), start), np.full((everyone, facts.num_classes), 28)
    found, made = 0.0, load("methods", method)

    def quiet(step, metrics):
        pass

    if isinstance(made, PoolMethod):
        rule, once = made.rule(config), {"global": start}

        def epochs(count):
            return operations(lambda: teach_from_pool(context, once, 0, count, clients, rule, report=quiet))

        first, second = epochs(1), epochs(2)  # the weights of the ensemble are learnt from the second epoch on
        found = first + (made.own(config).epochs - 1) * (second - first)
    elif method in ("fedftg", "dfrd"):
        game, knobs = (FedFtgGame(), FedFtgKnobs()) if method == "fedftg" else (DfrdGame(0.5), DfrdKnobs())
        state: dict[str, np.ndarray] = {}
        rounds = []
        for number in range(2):
            def play(number=number):
                state.update(take_turns(context, game, knobs, start, state, clients, counts, number)[1])
            rounds.append(operations(play))
        found = rounds[0] + (config.warmup.num_rounds - 1) * rounds[1]
    elif method == "fedcvae":
        own = FedCvaeKnobs()
        decoder = to_weights(build_generator(config.generator, facts.channels, facts.image_size, facts.num_classes))
        shares = [(k, decoder, own.samples // everyone) for k in range(everyone)]
        images = draw_images(context, shares, own.truncation)
        found = operations(lambda: draw_images(context, shares, own.truncation))
        state = {"global": start, "images": images}
        found += own.epochs * operations(lambda: learn_labels(context, state, 0, 1, own, "fedcvae", quiet))
    elif method == "centralised":
        found = config.warmup.num_rounds * config.warmup.local_steps * everyone * step
    assert method != "fens" or len(Ensemble(context, clients).models) == everyone
    return round(found / step)


def test_client_steps_and_bytes_of_the_table():
    assert set(COUNTED) <= set(ROWS)
    for method, cells in ROWS.items():
        config = config_of(method)
        facts = known_facts(config.data)
        counts = np.full((config.partition.num_clients, facts.num_classes), 28)
        traffic = predicted(config, facts, counts)
        up, down = (round(traffic.by_client(way).mean() / 1000) for way in ("uplink", "downlink"))
        wanted = [f"{round(client_steps(config)):,}", f"{up:,}", f"{down:,}"]
        assert cells[:3] == wanted, method


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in COUNTED]
)
def test_server_steps_of_the_table(method):
    assert ROWS[method][3].replace(",", "") == str(server_steps(method))
