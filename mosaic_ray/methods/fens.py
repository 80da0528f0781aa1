"""The method ``fens``: NOT DATA-FREE. FENS (Allouah et al., "Revisiting Ensembling in One-Shot Federated Learning",
NeurIPS 2024, arXiv 2411.07182): the clients' models as experts, and a gate trained on the clients' real images.

All clients get all experts, the models that clients sent in the last round of the warm-up. The gate is a network with
one hidden layer on the experts' concatenated logits, V relu(U [f_1(x) .. f_K(x)]), trained in federated rounds: SGD on
the clients, FedAdam on the server (docs/algorithm.md 3.22). The result is gate and experts, K networks: it is reported
as ``accuracy.teacher``, and the closing rounds begin at the warm-up's model. The finding ``method.not_data_free`` is in
each result.

Defaults: ``scripts/train_aggregator.sh``, ``models/smallnn.py`` and ``distoptim/FedAdam.py`` of the authors' code
(sacs-epfl/fens): one local step of SGD with rate 1 on 128 images, FedAdam with betas 0.9 and 0.99, a hidden layer of
2 K units (4 K here, the default of their arguments). Smaller here: 200 rounds with a server rate of 0.005, where theirs
are 500 with 0.001; up to 500 images a client, where theirs are a tenth of the client's. Where it differs: experts are
not quantised, and the gate's images are among those that the experts were trained on, where theirs are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.fields import knob
from ..config.plugins import own_knobs, section_of
from ..core.about import About, Paper
from ..core.health import NOT_DATA_FREE
from ..pipeline.graph import KeyInputs, Knobs, Stage
from ..pipeline.stages import driver_knobs, numbers_depend_on
from .base import Distilled, Method
from .server_side import needs_rounds, uploaded_models

if TYPE_CHECKING:
    import numpy as np

    from ..config.schema import ExperimentConfig
    from ..core.types import Weights
    from ..distillation.ensemble import GatedEnsemble
    from ..federated.client import ClientContext
    from ..federated.client_models import Federation
    from ..federated.communication import Entries, Size, Tally
    from ..pipeline.context import Facts, RunContext
    from ..pipeline.rounds import Warmup
    from ..storage.store import StageResult, StageWriter
    from ..tracking.progress import StageProgress


@dataclass(frozen=True)
class FensKnobs:
    rounds: int = knob(200, "federated rounds of the gate", low=1)
    lr: float = knob(5e-3, "FedAdam's learning rate on the server", above=0.0)
    local_lr: float = knob(1.0, "clients' SGD learning rate", above=0.0)
    local_steps: int = knob(1, "clients' steps a round", low=1)
    batch_size: int = knob(128, "images of a step", low=1)
    hidden: int = knob(4, "units of the hidden layer for each expert", low=1)
    images: int = knob(500, "images of each client that train the gate; 0: all", low=0)


def _own(config: ExperimentConfig) -> FensKnobs:
    return section_of(config, "fens", FensKnobs)


def _knobs(inputs: KeyInputs) -> Knobs:
    config = inputs.config
    common = {"seed": config.seed, "runtime": numbers_depend_on(config)}
    return own_knobs(config, "fens") | common | driver_knobs(config)


GATE = Stage(
    "gate", 1, _knobs, "mosaic_ray.methods.fens:train_gate", upstream=("partition", "warmup"), kind="fens",
    role="teacher", total=lambda config: _own(config).rounds,
    work=lambda config: {"gate steps": _own(config).rounds * _own(config).local_steps * config.partition.num_clients},
    messages="mosaic_ray.methods.fens:gate_messages",
)  # fmt: skip


class Fens(Method):
    """The clients' models and a gate that real images train: not data-free."""

    name = "fens"
    about = About(
        rounds="in rounds of its own, after the warm-up", data_free=False,
        statistics="changes of a gate that their real images train",
        papers=(Paper(
            "allouah2024revisiting", "Revisiting Ensembling in One-Shot Federated Learning", "NeurIPS", 2024,
            "Youssef Allouah, Akash Dhasade, Rachid Guerraoui, Nirupam Gupta, Anne-Marie Kermarrec, Rafael Pinot, "
            "Rafael Pires, Rishi Sharma", arxiv="2411.07182",
        ),),
    )  # fmt: skip
    knobs = FensKnobs
    stages = (GATE,)

    def check(self, config: ExperimentConfig) -> None:
        needs_rounds(self, config)

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        return Distilled(warmup.weights, teacher=ctx.run(GATE, warmup))


def train_gate(ctx: RunContext, stage: Stage, warmup: Warmup) -> GatedEnsemble:
    """Return the experts below the trained gate."""
    import numpy as np

    from ..core.seeding import seeded
    from ..distillation.ensemble import ExpertLogitsTask, GateTask, adam_on_server, gate_network
    from ..federated.communication import Tally, entries_of, size_of
    from ..models.state_dict import to_weights
    from ..pipeline.context import FailedClients
    from ..pipeline.evaluate import log_validation
    from ..pipeline.stored import check_entries, check_facts

    own, everyone = _own(ctx.config), list(range(ctx.config.partition.num_clients))
    experts, classes = uploaded_models(warmup), ctx.dataset.facts.num_classes
    [key] = ctx.client_keys(stage)
    with seeded(ctx.config.seed, "fens", "gate"):
        network = gate_network(len(experts), classes, own.hidden)

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        gate = to_weights(network)
        state = {"gate": gate} | {part: {n: np.zeros_like(v) for n, v in gate.items()} for part in ("first", "second")}
        checkpoint, done = ctx.store.load_checkpoint(key), 0
        traffic, failed = Tally(1, len(everyone)), FailedClients(stage.name)
        if checkpoint is not None:
            with checkpoint.read_as("checkpoint"):
                check_facts(checkpoint.facts)
                state, done = {part: checkpoint.load(part) for part in state}, checkpoint.facts["done"]
                for arrays in state.values():
                    check_entries(arrays, entries_of(gate))
                if not 0 < done < own.rounds:
                    raise ValueError(f"it was made after {done} of {own.rounds}")
                traffic = Tally(1, len(everyone), checkpoint.load("communication"))
                failed = FailedClients.of(stage.name, checkpoint.facts["left_out"])
            progress.resume(checkpoint.facts["curve"], done)
        else:
            _send_experts(traffic, everyone, {k: size_of(weights) for k, weights in experts.items()})
        task = ExpertLogitsTask(own.images)
        # in a deployment these stay on the clients
        kept = dict(ctx.map(task, everyone, experts, lambda k: None, failed_clients=failed, units=0))
        message = size_of(gate)
        for number in range(done, own.rounds):
            changes, losses = [], []
            for client_id in kept:
                traffic.add("downlink", "gate", client_id, message)
            answers = ctx.map(
                GateTask(number, own, len(experts)), list(kept), state["gate"], kept.__getitem__, failed_clients=failed
            )
            for client_id, (change, loss) in answers:
                changes.append((change, int(ctx.shards.sizes[client_id])))
                losses.append(loss)
                traffic.add("uplink", "gate", client_id, message)
            moved = adam_on_server(state["gate"], state["first"], state["second"], changes, own.lr)
            state = dict(zip(state, moved, strict=True))
            progress.scalar("fens/loss", number + 1, float(np.mean(losses)))
            progress.advance(note=f"loss {np.mean(losses):.3f}")
            if (number + 1) % 20 == 0 and number + 1 < own.rounds:
                curve = [list(row) for row in progress.recorded]
                facts = {"done": number + 1, "curve": curve, "left_out": failed.facts()}
                ctx.store.save_checkpoint(key, facts, state | {"communication": traffic.arrays()})
        writer.add("gate", state["gate"])
        writer.add("communication", traffic.arrays())
        label = NOT_DATA_FREE.finding("the gate was trained on the clients' real images", len(kept))
        rows = [finding.to_json() for finding in (*failed.findings(), label)]
        return {"communication": traffic.totals(), "findings": rows}

    result = ctx.find_or_compute(stage, compute)
    found = read_gate(ctx.client_context, result, experts)
    log_validation(ctx, stage.name, own.rounds, result.key, found)
    return found


def read_gate(context: ClientContext, result: StageResult, experts: dict[int, Weights]) -> GatedEnsemble:
    """Return the ``experts`` below the gate that the stage stored."""
    from ..core.seeding import seeded
    from ..distillation.ensemble import Ensemble, GatedEnsemble, gate_network
    from ..models.state_dict import load_weights

    with seeded(context.config.seed, "fens", "gate"), result.read_as("gate"):
        network = gate_network(len(experts), context.facts.num_classes, _own(context.config).hidden)
        gate = load_weights(network, result.load("gate")).requires_grad_(False)
    return GatedEnsemble(Ensemble(context, experts), gate.to(context.device)).eval()


def _send_experts(tally: Tally, clients: list[int], sizes: dict[int, Size]) -> None:
    """Add the others' experts to every client."""
    for client_id in clients:
        for owner, size in sizes.items():
            if owner != client_id:
                tally.add("downlink", "experts", client_id, size)


def gate_entries(experts: int, num_classes: int, hidden: int) -> Entries:
    """Return the entries of the gate's weights."""
    import numpy as np

    width = experts * hidden
    shapes = {"0.weight": (width, experts * num_classes), "0.bias": (width,), "2.weight": (num_classes, width),
              "2.bias": (num_classes,)}  # fmt: skip
    return {name: (shape, np.float32) for name, shape in shapes.items()}


def gate_messages(federation: Federation, counts: np.ndarray, tally: Tally) -> None:
    """Add the others' experts to every client, and the gate to it and back in every round."""
    from ..federated.communication import size_of_entries
    from ..pipeline.rounds import ADDRESS, answering, cohort_of

    config = federation.config
    own, last = _own(config), config.warmup.num_rounds - 1
    senders = answering(config, ADDRESS, last, cohort_of(config, ADDRESS, last))
    sizes = {
        k: size_of_entries(federation.entries(federation.classifiers[k], federation.widths[k])) for k in senders
    }
    clients = list(range(config.partition.num_clients))
    _send_experts(tally, clients, sizes)
    message = size_of_entries(gate_entries(len(senders), federation.facts.num_classes, own.hidden))
    for client_id in clients:
        for direction in ("downlink", "uplink"):
            tally.add(direction, "gate", client_id, message, times=own.rounds)


FENS = Fens()
