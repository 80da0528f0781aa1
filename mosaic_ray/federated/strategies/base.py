"""The contract of a federated strategy, and plain federated averaging.

A strategy makes independent choices: which channels of the model a client is sent, the client's local objective, the
logits that its loss sees, what it keeps, and how updates become a model. Names joined by ``+`` in
``federation.strategy`` combine strategies that choose different things: ``fedrolex+fedprox`` trains FedRolex's
submodels with FedProx's objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.about import About, Paper
from ...core.errors import RequestError

if TYPE_CHECKING:
    from ...config.schema import ExperimentConfig
    from ...core.types import Weights
    from ...models.submodel import ChannelIndices, ChannelLayout
    from ..client_models import Models, RoundAggregator, RoundStart
    from ..communication import Entries
    from ..local_training import LocalStart, LogitAdjustment, Objective


class Strategy:
    """A federated strategy. The methods here are federated averaging: override some, and keep no state in the object.

    State is arrays by name. The server's travels to every client of a round; a client's own travels to that client
    alone. Both are part of checkpoints, so a killed run resumes with the same numbers. Closing rounds begin without.
    """

    kind = "strategies"
    #: The name under which its own knobs are set (``NAME.KNOB``), and under which it is listed.
    name: str
    #: Raise it when the mathematics changes: older results are then computed again.
    version: int = 1
    #: A frozen dataclass of ``config.fields.knob`` fields, or None.
    knobs: type | None = None
    #: What it needs of its clients and where it was published; None: nothing is declared.
    about: About | None = None
    #: Whether clients may hold a part of the model (``federation.widths`` below 1).
    partial_widths: bool = False
    #: Whether it needs whole models even beside a strategy that takes parts of them.
    whole_models: bool = False
    #: Whether clients may lack modalities of the data.
    partial_modalities: bool = True
    #: Whether samples must have several modalities.
    several_modalities: bool = False
    #: Whether models travel in every round; else down in the first one and up in the last.
    every_round: bool = True
    #: Whether clients have models of their own, which ``personal`` returns and a run evaluates after the warm-up.
    personal_models: bool = False
    #: Operations of a local step in those of plain training, where an own ``objective`` may change them; None: unknown.
    step_cost: float | None = None

    def check(self, config: ExperimentConfig) -> None:
        """Raise ``RequestError`` where ``config`` asks for something that this strategy cannot do."""

    def joined(self, others: Sequence[Strategy]) -> Strategy:
        """Return one strategy that combines this one and ``others``; ``RequestError`` if two conflict."""
        return Combined([self, *others])

    def channel_indices(
        self, channels: ChannelLayout, width: float, *, round_num: int, seed: int, client_id: int
    ) -> ChannelIndices:
        """Return the channels that a client of ``width`` < 1 is sent in a round, for each group of channels."""
        raise NotImplementedError(f"{self.name} sends whole models")

    def initial_state(self, models: Models) -> Weights:
        """Return the server's arrays before the first round."""
        return {}

    def receive(self, weights: Weights, state: Weights) -> Weights:
        """Return the weights that a client begins with: the received ``weights``, changed by its own ``state``."""
        return weights

    def objective(self, start: LocalStart) -> Objective:
        """Return the objective of one client's local training in one round."""
        from ..local_training import Objective

        return Objective()

    def adjust_logits(self, start: LocalStart) -> LogitAdjustment | None:
        """Return a function of the logits float32 [B, C] to those that a client's loss sees, or None: no change.

        ``start.labels`` are the client's training labels.
        """
        return None

    @property
    def plain_steps(self) -> bool:
        """Return whether a client's local steps are those of plain training."""
        plain = (Strategy.objective, Strategy.adjust_logits)
        return all(getattr(getattr(self, of.__name__), "__func__", None) is of for of in plain)

    def personal(self, weights: Weights, state: Weights) -> Weights:
        """Return a client's own model, from the global one of its network and its ``state`` after the last round."""
        return weights

    def aggregator(self, start: RoundStart) -> RoundAggregator:
        """Return the object that adds the updates of one round, in client order, and makes new models of them."""
        from ..client_models import RoundAggregator

        return RoundAggregator(start)

    def messages(self, network: Entries) -> tuple[Entries, Entries]:
        """Return the arrays that a client receives and sends in every round, beside the model.

        Args:
            network: names, shapes and types of the whole network's state dict.
        """
        return {}, {}


#: What one part of a combination may choose.
_CHOICES = (
    "channel_indices", "initial_state", "receive", "objective", "adjust_logits", "personal", "aggregator", "messages",
)  # fmt: skip


class Combined(Strategy):
    """Several strategies as one; ``RequestError`` where two of them make the same choice."""

    def __init__(self, parts: Sequence[Strategy]) -> None:
        self.name = "+".join(part.name for part in parts)
        self.whole_models = any(part.whole_models for part in parts)
        self.partial_widths = any(part.partial_widths for part in parts) and not self.whole_models
        self.every_round = all(part.every_round for part in parts)
        self.partial_modalities = all(part.partial_modalities for part in parts)
        self.several_modalities = any(part.several_modalities for part in parts)
        self.personal_models = any(part.personal_models for part in parts)
        self._parts = parts
        for choice in _CHOICES:
            owners = [part for part in parts if getattr(type(part), choice) is not getattr(Strategy, choice)]
            if len(owners) > 1:
                names = " and ".join(part.name for part in owners)
                raise RequestError(f"federation.strategy = {self.name}: {names} cannot be combined, both set {choice}")
            if owners:
                setattr(self, choice, getattr(owners[0], choice))

    def check(self, config: ExperimentConfig) -> None:
        for part in self._parts:
            part.check(config)


class FedAvg(Strategy):
    """Average whole models, weighted by the clients' numbers of samples.

    McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017.
    """

    name = "fedavg"
    about = About(
        papers=(Paper(
            "mcmahan2017communication", "Communication-Efficient Learning of Deep Networks from Decentralized Data",
            "AISTATS", 2017, "H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas",
            arxiv="1602.05629",
        ),),
    )  # fmt: skip


FEDAVG = FedAvg()
