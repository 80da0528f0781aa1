"""Ensembles of clients' models, the weights of their answers, and the loops that teach by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ensembles import COUNTS, IMAGES, LABELS, LATENTS, LOGITS, B, C, K, context, tiny
from helpers import TINY, assert_same, stripes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mosaic_ray.config.plugins import section_of
from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RunError
from mosaic_ray.distillation.ensemble import (
    Ensemble,
    GateTask,
    adam_on_server,
    class_weights,
    descend,
    gate_network,
    load_slots,
    mixed,
    slots,
    spread_loss,
    take_turns,
    teach_from_pool,
)  # fmt: skip
from mosaic_ray.federated.client import initial_weights
from mosaic_ray.methods.co_boosting import CO_BOOSTING
from mosaic_ray.methods.dense import DENSE
from mosaic_ray.methods.dfrd import DfrdGame, DfrdKnobs
from mosaic_ray.methods.fedftg import FedFtgGame, FedFtgKnobs
from mosaic_ray.methods.fens import FensKnobs, gate_entries
from mosaic_ray.models.state_dict import load_weights, to_weights


@given(arrays(np.int64, (4, 3), elements=st.integers(0, 50)))
def test_weights_of_a_label_sum_to_one_where_anybody_holds_it(counts):
    found = class_weights(counts)
    assert np.allclose(found.sum(0), counts.sum(0) > 0, atol=1e-6)
    assert (found[counts == 0] == 0).all()


def test_weights_and_mixture_written_out():
    assert np.allclose(class_weights(COUNTS), [[3 / 4, 0, 2 / 4], [1 / 4, 1, 2 / 4]])
    by_client = torch.tensor([0.25, 0.75], dtype=torch.float64)
    by_label = torch.tensor(class_weights(COUNTS)).double()[:, LABELS]
    for weights in (by_client, by_label):
        for i in range(B):
            own = weights if weights.dim() == 1 else weights[:, i]
            for c in range(C):
                wanted = sum(float(own[k]) * float(LOGITS[k, i, c]) for k in range(K))
                assert float(mixed(LOGITS, weights)[i, c]) == pytest.approx(wanted)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_spread_loss_written_out(absolute):
    total = 0.0
    x = IMAGES.flatten(1)
    for i in range(B):
        for j in range(B):
            apart = x[i] - x[j]
            images = float(apart.abs().mean() if absolute else (apart**2).mean())
            total += float(((LATENTS[i] - LATENTS[j]) ** 2).mean()) * images
    assert float(spread_loss(LATENTS, IMAGES, absolute)) == pytest.approx(np.exp(-total / B**2))


def test_the_authors_numbers_of_the_spread():
    """Of DiversityLoss in FedFTG's train_gan_fn.py (l1) and DFDG's lightfed/tools/model.py (l2)."""
    assert float(spread_loss(LATENTS, IMAGES, absolute=True)) == pytest.approx(0.42243210549792504)
    assert float(spread_loss(LATENTS, IMAGES)) == pytest.approx(0.40286284590530214)


def test_a_narrow_clients_activations_are_divided_by_its_width():
    config = override(TINY, {"federation.strategy": "heterofl", "federation.widths": (0.5,)})
    made = context(config)
    federation = made.federation
    whole = initial_weights(made)
    narrow = federation.submodel(0, {"cnn": whole}, federation.indices(0, "local", 0))
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scaled = {n: v / 0.5 if v.ndim == 4 else v for n, v in narrow.items()}  # convolutions without bias
    wanted = made.client_classifier(0, scaled).eval()(images)
    assert torch.allclose(Ensemble(made, {0: narrow})(images)[0], wanted, atol=1e-5)
    plain = context(override(config, {"federation.scaler": False}))
    assert not torch.allclose(Ensemble(plain, {0: narrow})(images)[0], wanted, atol=1e-3)


def test_the_inversion_loss_is_the_mean_over_the_clients_models():
    made = context()
    start = initial_weights(made)
    other = {n: v * 2 if n.endswith("running_var") else v for n, v in start.items()}
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = [Ensemble(made, {0: w}).probed(images)[1] for w in (start, other)]
    logits, both = Ensemble(made, {0: start, 1: other}).probed(images)
    assert float(both) == pytest.approx(float(sum(alone)) / 2, rel=1e-5) and logits.shape == (2, 6, 3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizers_arrays_come_back(kind):
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.ones(1, 2)
    first, second = (kind(net.parameters(), lr=0.1, **more) for net in nets)
    for _ in range(2):
        descend(first, nets[0](x).square().sum())
    descend(second, nets[1](x).square().sum())
    again = torch.nn.Linear(2, 2)
    load_weights(again, to_weights(nets[1]))
    third = kind(again.parameters(), lr=0.1, **more)
    load_slots(third, again, slots(second, nets[1]))
    descend(third, again(x).square().sum())
    assert_same(to_weights(again), to_weights(nets[0]))


def test_divergence_is_an_error_of_one_line():
    net = torch.nn.Linear(1, 1)
    with pytest.raises(RunError, match="training on the server diverged"):
        descend(torch.optim.SGD(net.parameters(), lr=1), net(torch.tensor([[float("nan")]])).sum())


@pytest.mark.parametrize("method", [DENSE, CO_BOOSTING])
def test_parts_of_a_pool_are_the_whole(method):
    """Epochs 0 to 5 at once, or in two calls with the state between them."""
    config = tiny(method.name)
    made = context(config)
    start = initial_weights(made)
    clients = {0: start, 2: {n: v + np.asarray(v * 0.1, v.dtype) for n, v in start.items()}}
    rule, log = method.rule(config), []

    def report(step, metrics):
        log.append(step)

    whole = teach_from_pool(made, {"global": start}, 0, 5, clients, rule, report=report)
    part = teach_from_pool(made, {"global": start}, 0, 2, clients, rule, report=report)
    part = teach_from_pool(made, part, 2, 5, clients, rule, report=report)
    assert log == [1, 2, 3, 4, 5] * 2
    assert whole.keys() == part.keys() == {"global", "optimizer", "ensemble", "pool"}
    for name in whole:
        assert_same(whole[name], part[name])
    assert whole["pool"]["images"].shape == (40, 1, 8, 8)
    weights = whole["ensemble"]["weights"]
    assert (weights >= 0).all() and (weights <= 1).all()
    assert np.allclose(weights, 0.5) == (method is DENSE)
    assert not np.array_equal(whole["global"]["head.weight"], start["head.weight"])


class Recorded(FedFtgGame):
    """FedFTG's players, which note the batches."""

    def __init__(self):
        self.batches = []

    def generator_loss(self, knobs, step, batch):
        self.batches.append(batch)
        return super().generator_loss(knobs, step, batch)


def test_samples_are_weighted_by_the_label_that_was_asked_for():
    made, start = context(), initial_weights(context())
    counts = np.array([[5, 0, 0], [15, 8, 0]])
    game = Recorded()
    knobs = FedFtgKnobs(latent_dim=4, channels=4, batch_size=32, turns=3)
    take_turns(made, game, knobs, start, {}, {0: start, 2: start}, counts, 0)
    assert len(game.batches) == 3 * 2
    for batch in game.batches:
        asked = batch.labels.tolist()
        assert set(asked) == {0, 1}  # nobody holds class 2
        wanted = {0: [0.25, 0.75], 1: [0.0, 1.0]}
        assert np.allclose(batch.weights.T.numpy(), [wanted[y] for y in asked])
    shares = np.bincount(torch.cat([b.labels for b in game.batches[::2]]).numpy()) / 96
    assert abs(shares[0] - 20 / 28) < 0.15


def test_the_generator_goes_on_and_dfrd_keeps_its_average():
    made, start = context(), initial_weights(context())
    clients, counts = {0: start, 1: start}, np.array([[3, 1, 0], [1, 2, 4]])
    knobs = DfrdKnobs(latent_dim=4, channels=4, batch_size=8, turns=1)
    game = DfrdGame(0.75)
    _, first, _ = take_turns(made, game, knobs, start, {}, clients, counts, 0)
    _, second, _ = take_turns(made, game, knobs, start, first, clients, counts, 1)
    name = "embedding.weight"
    assert np.array_equal(first[f"average/{name}"], first[f"now/{name}"])
    assert not np.array_equal(first[f"now/{name}"], second[f"now/{name}"])
    wanted = 0.75 * first[f"average/{name}"] + 0.25 * second[f"now/{name}"]
    assert np.allclose(second[f"average/{name}"], wanted, atol=1e-7)
    frozen = [n for n in start if "running" in n]
    student, _, _ = take_turns(made, game, knobs, start, {}, clients, counts, 0)
    assert all(np.array_equal(student[n], start[n]) for n in frozen)
    moving = DfrdKnobs(latent_dim=4, channels=4, batch_size=8, turns=1, bn="running")
    student, _, _ = take_turns(made, game, moving, start, {}, clients, counts, 0)
    assert not any(np.array_equal(student[n], start[n]) for n in frozen)


def test_fedadam_written_out():
    gate, zero = {"w": np.array([1.0, -2.0], np.float32)}, {"w": np.zeros(2, np.float32)}
    changes = [({"w": np.array([0.5, 0.1], np.float32)}, 1), ({"w": np.array([-0.1, 0.3], np.float32)}, 3)]
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    now, first, second = gate, zero, zero
    for _ in range(3):
        now, first, second = adam_on_server(now, first, second, changes, 0.01)
        for i, delta in enumerate((0.25 * 0.5 - 0.75 * 0.1, 0.25 * 0.1 + 0.75 * 0.3)):
            m[i] = 0.9 * m[i] + 0.1 * delta
            v[i] = 0.99 * v[i] + 0.01 * delta**2
            x[i] += 0.01 * m[i] / (v[i] ** 0.5 + 1e-3)
    assert np.allclose(now["w"], x, atol=1e-6) and now["w"].dtype == np.float32


def test_a_gates_change_is_one_step_down_the_gradient():
    made, knobs = context(), FensKnobs(batch_size=100)
    gate = to_weights(gate_network(2, 3, knobs.hidden))
    assert {n: (v.shape, v.dtype) for n, v in gate.items()} == gate_entries(2, 3, knobs.hidden)
    draws = np.random.default_rng(0)
    own = {"logits": draws.normal(size=(9, 6)).astype(np.float32), "labels": stripes(9).labels}
    change, loss = GateTask(0, knobs, 2).run(made, None, 0, gate, own)  # type: ignore[arg-type]
    net = load_weights(gate_network(2, 3, knobs.hidden), gate)
    wanted = torch.nn.functional.cross_entropy(net(torch.tensor(own["logits"])), torch.tensor(own["labels"]))
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    for name, parameter in net.named_parameters():
        assert np.allclose(change[name], -parameter.grad.numpy(), atol=1e-5)


def test_knobs_come_from_the_methods_own_section():
    found = section_of(tiny("dfrd", dfrd__ema=0.25), "dfrd", DfrdKnobs)
    assert (found.ema, found.turns, found.temperature) == (0.25, 2, 10.0)
