"""The control with equal client compute: counted operations against the real training code, rounds, and `compare`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cli_runner import ask, refusal
from helpers import FACTS, TINY, shard_of, stripes
from signs import FACTS as SIGNS
from signs import signs
from torch import nn
from trials import printed, trial

from mosaic_ray.cli.request import compare_plan
from mosaic_ray.config.plugins import strategy_named
from mosaic_ray.config.registry import STRATEGIES
from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.types import DataFacts
from mosaic_ray.data.load import known_facts
from mosaic_ray.distillation import condensation, cvae_training, generator_training
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.local_training import LocalStart, LocalTrainingConfig, train_locally
from mosaic_ray.models.state_dict import to_weights
from mosaic_ray.report.comparison import compare
from mosaic_ray.runs import equal_compute
from mosaic_ray.runs.equal_compute import client_costs, client_steps, extra_rounds, operations, with_controls
from mosaic_ray.sweeps.results import result_rows

FAMILIES = [
    {}, {"generator.family": "cgan"}, {"generator.family": "cvae"},
    {"generator.family": "cvae", "generator.feature_weight": 1.0}, {"generator.discriminator": "shared_trunk"},
    {"generator.lambda_e": 0.0, "generator.lambda_d": 0.0}, {"generator.tau": 0, "generator.ngf": 6},
    *(
        {"generator.family": "condensed", "generator.images_per_class": 3, "generator.matching_channels": 6,
         "generator.batch_size": 8, "generator.least_images": 1, "generator.matching_global": share}
        for share in (0.0, 1.0)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "knobs, several", [*((knobs, False) for knobs in FAMILIES), *((knobs, True) for knobs in FAMILIES[1:3])]
)
def test_counted_steps_are_those_of_the_training_code(knobs, several, monkeypatch):
    """What one more step of the real code, with real numbers, adds."""
    config = override(TINY, knobs | {"partition.num_clients": 1, "model.width": 3})
    facts, samples = (SIGNS, signs(40, 0)) if several else (FACTS, stripes(40))
    context = ClientContext(config, facts, torch.device("cpu"))
    weights, shard = initial_weights(context), shard_of(samples)
    for module in (generator_training, cvae_training, condensation):
        monkeypatch.setattr(module, "snapshot_steps", lambda steps: ())
    cvae = config.generator.family == "cvae"

    def generator(steps: int) -> None:
        section, model = override(config, {"generator.steps": steps}).generator, context.classifier(weights)
        rest = (shard, section, facts, (0, 0), "fp32")
        if cvae:
            features = context.classifier(weights) if section.feature_weight else None
            cvae_training.train_cvae(model, *rest, features=features)
        elif config.generator.family == "condensed":
            condensation.train_condensed(model, *rest, global_model=context.classifier(weights))
        else:
            generator_training.train_generator(model, weights, *rest)

    def local(steps: int) -> None:
        plan = LocalTrainingConfig(steps, config.warmup.batch_size, 0.1)
        train_locally(context.classifier(weights), shard, plan, facts, (0, "local", 0, 0), "fp32")

    steps = [operations(lambda n=n, work=work: work(n)) for work in (generator, local) for n in (1, 2)]
    assert client_costs(config, facts) == (steps[1] - steps[0], steps[3] - steps[2])


def test_a_classifiers_step_by_hand():
    """Forward, and gradients of weights and inputs; the images need none."""
    model, macs = ClientContext(TINY, FACTS, torch.device("cpu")).classifier(), []

    def count(module, inputs, output):
        macs.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(TINY.warmup.batch_size, 1, 8, 8))
    assert client_costs(TINY, FACTS)[1] == TINY.partition.num_clients * 2 * (3 * sum(macs) - macs[0])


def test_clients_of_several_networks_and_widths_are_added_up():
    one, two = ({"partition.num_clients": n} for n in (1, 2))
    whole = client_costs(override(TINY, one), FACTS)
    narrow = {"federation.strategy": "heterofl", "federation.widths": (1.0, 0.5)}
    found = client_costs(override(TINY, two | narrow), FACTS)
    assert whole[0] < found[0] < 2 * whole[0] and whole[1] < found[1] < 2 * whole[1]
    mixed = client_costs(override(TINY, two | {"model.classifiers": ("cnn", "resnet18")}), FACTS)
    assert mixed[1] > 2 * whole[1]


@pytest.mark.parametrize(
    "steps, local, clients, cohort, rounds",
    [(10, 5, 4, 0, 4), (11, 5, 4, 0, 5), (10, 5, 4, 2, 8), (10, 5, 4, 1, 16), (0, 5, 4, 0, 0), (1, 50, 4, 0, 1)],
)
def test_rounds_are_rounded_up_and_a_cohort_makes_them_cheaper(monkeypatch, steps, local, clients, cohort, rounds):
    """A step of a generator costs as much as two steps of a classifier here."""
    monkeypatch.setattr(equal_compute, "client_costs", lambda *_: (2 * clients * 1000, clients * 1000))
    knobs = {"partition.num_clients": clients, "federation.cohort_size": cohort, "warmup.local_steps": local}
    config = override(TINY, knobs | {"generator.steps": max(steps, 1)})
    assert extra_rounds(config) == (rounds if steps else extra_rounds(override(config, {"generator.steps": 1})))


@pytest.mark.parametrize(
    "knobs, line",
    [
        ({"generator.epochs": 2}, r"generator\.epochs = 2: equal client compute"),
        ({"generator.classifier_source": "fresh"}, r"generator\.classifier_epochs = 50: equal"),
    ],
)
def test_steps_that_follow_from_the_images_are_refused(knobs, line):
    with pytest.raises(RequestError, match=line):
        extra_rounds(override(TINY, knobs))


def test_the_count_is_a_function_of_the_configuration_alone(monkeypatch):
    monkeypatch.setattr(equal_compute, "load_dataset", lambda config: pytest.fail("images were read"))
    before = torch.random.get_rng_state()
    config = override(TINY, {"data.name": "cifar10", "data.root": "nowhere", "model.width": 8})
    first = extra_rounds(config)
    client_costs.cache_clear()
    assert first == extra_rounds(override(config, {"seed": 3, "runtime.device": "cuda"})) > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    facts = DataFacts("x", 10, 3, 16, (0.5,) * 3, (0.5,) * 3)
    assert client_costs(config, facts) != client_costs(config, FACTS)


# --- the comparison --------------------------------------------------------------------------------------------------


def test_each_strategy_with_generators_gets_its_control(monkeypatch):
    monkeypatch.setattr(equal_compute, "extra_rounds", lambda config: 7)
    rounds = TINY.warmup.num_rounds
    points = compare_plan("fedavg,mosaic,lda_head,mosaic+fedprox").points
    found = with_controls(TINY, points)
    assert found[:4] == points and found[4:] == (
        {"method": "fedavg", "warmup.num_rounds": rounds + 7},
        {"method": "fedavg", "federation.strategy": "fedprox", "warmup.num_rounds": rounds + 7},
    )
    table = compare(result_rows([trial(4, knobs={"method": "fedavg"})]), found, TINY)
    names = [method.name for method in table.sections[None]]
    assert names == ["fedavg", "mosaic", "lda_head", "mosaic+fedprox", "fedavg (+7 rounds)", "fedprox (+7 rounds)"]
    assert any("(+N rounds): as many more rounds" in line for line in printed(table, 200))
    assert not any("(+N rounds)" in line for line in printed(compare([], points, TINY), 200))


def test_strategies_with_longer_steps_get_plain_averaging_at_the_same_compute():
    """Ditto's steps cost two, MOON's five thirds; the warm-up has 9 local steps, the closing 6, a round 3."""
    config = override(TINY, {"data.name": "digits"})
    points = compare_plan("fedavg,ditto,lda_head+moon,scaffold").points
    found = with_controls(config, points)
    rounds = [control["warmup.num_rounds"] - TINY.warmup.num_rounds for control in found[4:]]
    assert found[:4] == points and rounds == [5, 4]
    assert all(control.keys() == {"method", "warmup.num_rounds"} for control in found[4:])
    for point, control in zip((points[1], points[2]), found[4:], strict=True):
        spent, given = (client_steps(override(config, knobs)) for knobs in (point, control))
        assert spent <= given < spent + TINY.warmup.local_steps
    alone = with_controls(override(config, {"federation.strategy": "ditto"}), compare_plan("ditto,moon").points)
    assert [control["federation.strategy"] for control in alone[2:]] == ["fedavg"] * 2
    names = [method.name for method in compare([], alone, config).sections[None]]
    assert names == ["ditto", "moon", "fedavg (+5 rounds)", "fedavg (+4 rounds)"]


def test_generators_cost_fewer_of_dearer_rounds(monkeypatch):
    monkeypatch.setattr(equal_compute, "client_costs", lambda *_: (2 * 3000, 3000))
    plain, ditto = (override(TINY, {"federation.strategy": name}) for name in ("fedavg", "ditto"))
    assert (extra_rounds(plain), extra_rounds(ditto)) == (4, 2)  # 6 steps of generators are 12 local ones


def test_a_clients_compute_is_that_of_its_stages(monkeypatch):
    """A generator's step costs as much as two local steps, and a batch of synthetic images half of one."""
    monkeypatch.setattr(equal_compute, "client_costs", lambda *_: (2 * 3000, 3000))
    monkeypatch.setattr(equal_compute, "_drawing", lambda *_: 500)
    knobs = {"partition.num_clients": 3, "data.name": "digits"}
    base = override(TINY, knobs)
    rounds, closing = 3 * 3, 2 * 3  # rounds of steps

    def steps(**more):
        return client_steps(override(base, {name.replace("__", "."): value for name, value in more.items()}))

    assert steps(method="fedavg") == rounds + closing, "neither the control nor the ceiling counts"
    assert steps(method="fedavg", runtime__ceiling=True) == steps(method="prototype_head") == rounds + closing
    assert steps(method="mosaic") == rounds + closing + 2 * 6
    rehearsing = {"rehearsal__weight": 1.0, "rehearsal__ratio": 0.5, "method": "mosaic"}
    assert steps(**rehearsing) == pytest.approx(rounds + closing * (1 + 0.5 * 1.5) + 2 * 6)
    tried = {"rehearsal__candidates": (0.3,), "rehearsal__trial_rounds": 4, "method": "mosaic"}
    assert steps(**tried) == pytest.approx(rounds + closing * 2.5 + 2 * 6 + 4 * 3 * (1 + 2.5))
    assert steps(method="fedavg", federation__cohort_size=2) == pytest.approx((rounds + closing) * 2 / 3)
    assert steps(method="fedavg", federation__drop_rate=0.25) == pytest.approx((rounds + closing) * 0.75)
    assert steps(method="fedavg", federation__strategy="scaffold", warmup__momentum=0.0) == rounds + closing
    assert steps(method="mosaic", generator__epochs=1) is None, "it follows from a client's images"


LAB = Path(__file__).parents[1] / "plugins/lab"


def test_the_compute_of_a_plug_in_is_not_known(monkeypatch, tmp_path):
    base = override(TINY, {"data.name": "digits", "method": "fedavg"})
    assert client_steps(base) == 15
    own = (LAB / "nearest_mean.py").read_text().replace('"nearest_mean"', '"own_mean"')
    (tmp_path / "own.py").write_text(own)
    assert client_steps(override(base, {"method": f"{tmp_path}/own.py:NEAREST_MEAN"})) is None
    monkeypatch.setattr(equal_compute, "shape_of", lambda config: None)
    assert client_steps(base) is None


@pytest.mark.parametrize("name, cost", [("fedavg", 1), ("fedprox", 1), ("moon", 5 / 3), ("ditto", 2)])
def test_the_cost_of_a_strategys_step_is_that_of_the_training_code(name, cost):
    """A forward pass counts as a third of a step; the first layer's, which needs no gradient of images, is more."""
    context = ClientContext(TINY, FACTS, torch.device("cpu"))
    plan, shard = LocalTrainingConfig(2, TINY.warmup.batch_size, 0.1), shard_of(stripes(40))

    def train(strategy) -> None:
        model = context.classifier(initial_weights(context))
        state = to_weights(model) if name == "moon" else {}
        objective = strategy.objective(LocalStart(TINY, FACTS, 0, 1, plan, model, shard.labels, {}, state))
        train_locally(model, shard, plan, FACTS, (0, "local", 1, 0), "fp32", objective=objective)

    found = operations(lambda: train(strategy_named(name))) / operations(lambda: train(strategy_named("fedavg")))
    assert found == pytest.approx(cost, rel=0.1)
    assert equal_compute._local_step(override(TINY, {"federation.strategy": name})) == cost


def test_the_compute_of_every_strategy_that_ships_is_known():
    for name in STRATEGIES:
        assert equal_compute._local_step(override(TINY, {"federation.strategy": name})) >= 1, name
    pair = override(TINY, {"federation.strategy": "ditto+fedlc"})
    assert equal_compute._local_step(pair) == 2


def test_drawing_a_batch_by_hand():
    """Operations of one pass of the generator, counted layer by layer."""
    from mosaic_ray.models.generator import build_generator

    generator, macs = build_generator(TINY.generator, 1, 8, 3), []

    def count(module, inputs, output):
        transposed = isinstance(module, nn.ConvTranspose2d)
        places, each = (inputs[0], module.weight[0]) if transposed else (output, module.weight[0])
        macs.append(places.numel() * each.numel())

    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(count)
    generator(torch.zeros(TINY.warmup.batch_size, TINY.generator.latent_dim))
    assert equal_compute._drawing(TINY, FACTS) == 2 * sum(macs) > 0


@pytest.mark.usefixtures("two_cpus")
def test_the_command_adds_a_row():
    words = ["compare", "--preset", "fmnist_small+distilled", "--dry-run", "--seeds", "0,1"]
    plain, found = (ask(*words, *more).stdout for more in ([], ["--equal-compute"]))
    assert "6 trials (3 points x 2 seeds)" in plain and "8 trials (4 points x 2 seeds)" in found
    counted = [dict(re.findall(r"^(\w+) +\d+ +(\d+)", text, re.MULTILINE)) for text in (plain, found)]
    assert [found["warmup"] for found in counted] == ["2", "4"]
    steps = [int(re.search(r"^warmup.*rounds, ([\d,]+) local", text, re.MULTILINE)[1].replace(",", "")) for text in
             (plain, found)]  # fmt: skip
    # 400 steps of a GAN are the work of 715 steps of this network, so of 71.5 rounds of 10 steps
    assert steps[1] - 2 * steps[0] == 2 * 72 * 10 * 10
    assert "--equal-compute: none of --methods" in refusal(ask(*words, "--equal-compute", "--methods", "fedavg"))


def test_samples_of_several_modalities_are_counted_as_what_they_are():
    """A generator of six views costs what its decoders and encoders do, not what one of an 8 x 8 image would."""
    knobs = {"data.name": "mfeat", "method": "mosaic", "generator.family": "cvae", "generator.steps": 10}
    config = override(TINY, knobs | {"distill.steps": 0, "rehearsal.weight": 1.0, "finetune.num_rounds": 0})
    generators, step = client_costs(config, known_facts(config.data))
    rounds = config.warmup.num_rounds * config.warmup.local_steps
    assert client_steps(config) == pytest.approx(rounds + 10 * generators / step)
