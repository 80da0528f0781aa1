"""Health rules: turn the figures of a stage into findings (docs/algorithm.md 4; docs/HEALTH.md explains each code).

All functions are pure. Every ``Rule`` holds its threshold and advice. Figures may be NaN or infinite. No figure is
computed on test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .types import Finding, Severity

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """The code, default severity, threshold and advice of a finding.

    ``threshold`` is compared with the value; None if the value is compared with another figure of the run.
    """

    code: str
    stage: str
    severity: Severity
    threshold: float | None
    advice: str

    def finding(
        self,
        message: str,
        value: float,
        *,
        client: int = -1,
        severity: Severity | None = None,
        threshold: float | None = None,
        advice: str = "",
        stage: str = "",
    ) -> Finding:
        """Build a finding with ``value``; the keyword arguments override the rule's defaults."""
        limit = self.threshold if threshold is None else threshold
        known = float(value) if math.isfinite(value) else None
        return Finding(
            self.code, severity or self.severity, stage or self.stage, message, client, known, limit,
            advice or self.advice,
        )  # fmt: skip


IDLE_GPUS = Rule(
    "devices.idle_gpus", "warmup", "warning", 0, "leave runtime.device and runtime.gpus_per_client at auto"
)

NOT_FEDERATED = Rule(
    "method.not_federated", "distill", "info", None,
    "read it as an upper bound of federated methods, not as one of them",
)  # fmt: skip
NOT_DATA_FREE = Rule(
    "method.not_data_free", "gate", "info", None, "compare it with methods that train on real images as well"
)

EMPTY_CLASS = Rule(
    "partition.empty_class", "partition", "warning", 0,
    "raise partition.omega or lower partition.num_clients and partition.validation_fraction; of a class that the data "
    "set itself lacks nothing can be learnt",
)  # fmt: skip

# Share of the entropy of the client's labels, so that little is required of a client with almost one class: 0.2 are two
# classes shown as 97 : 3 by a client that has equally many images of both.
MODE_COLLAPSE = Rule(
    "generator.mode_collapse", "generators", "warning", 0.2, "raise generator.lambda_d or generator.steps"
)
# Share of the real images' variance in feature space; a cosine of .98 between features leaves 2 % of their square.
LOW_VARIETY = Rule(
    "generator.mode_collapse", "generators", "warning", 0.02, "raise generator.steps; lower a GAN's generator.lambda_e"
)
# Share of the client's images in classes that are shown, so that classes of one or two images count little. Below one
# half, distillation harms the student (docs/algorithm.md 8).
LOW_COVERAGE = Rule(
    "generator.low_coverage", "generators", "warning", 0.5, "raise generator.steps, or a GAN's generator.lambda_d"
)
LOW_LABEL_AGREEMENT = Rule(
    "generator.label_agreement", "generators", "warning", 0.5, "raise generator.steps, or a GAN's generator.lambda_e"
)
# Accuracy on real and on synthetic images, over the last quarter of training: the generator gets almost no gradient.
DISCRIMINATOR_OVERPOWER = Rule(
    "generator.discriminator_overpower", "generators", "warning", 0.99,
    "lower generator.ndf or generator.lr, or set generator.diff_augment=true",
)  # fmt: skip
# Values out of the range of tanh give real images away to the discriminator; in [-1, 1] there are none.
OUT_OF_RANGE = Rule("generator.out_of_range", "generators", "warning", 0.05, "set generator.gan_range=pm1_then_renorm")

MISSING_PROTOTYPES = Rule(
    "prototypes.too_few", "prototypes", "warning", 0, "raise prototypes.k, prototypes.samples or prototypes.cap"
)
NO_HELD_OUT_PROTOTYPES = Rule(
    "prototypes.too_few", "teacher", "warning", 1, "raise prototypes.k or prototypes.held_out"
)

# Share of the pairs of classes that are not held by one client alone: above it most experts are one model.
REDUNDANT_EXPERTS = Rule(
    "experts.redundant", "teacher", "warning", 0.5,
    "experts need clients that differ: a smaller partition.omega, more warmup.local_steps or a larger warmup.lr",
)  # fmt: skip
SINGLE_OWNER_CLASSES = Rule(
    "experts.single_owner", "teacher", "info", 0,
    "nothing need be done; a larger partition.omega or fewer clients would share classes out",
)  # fmt: skip
# In units of log C, the loss of guessing: no successful training ends above it.
META_DIVERGED = Rule(
    "meta.diverged", "teacher", "error", 2, "lower meta.lr, or set meta.init=prototype_head and meta.select=true"
)
TEACHER_BELOW_STUDENT = Rule(
    "teacher.below_student", "teacher", "warning", None, "set meta.input=head and meta.init=prototype_head"
)

# Share of the classes that clients hold that the teacher predicts on synthetic images.
UNSEEN_CLASSES = Rule(
    "generator.low_coverage", "distill", "warning", 0.5,
    "raise generator.steps, or a GAN's generator.lambda_d; see the generators' findings",
)  # fmt: skip
# Share of the synthetic images on which the two inputs of the teacher give different classes.
INPUT_SHIFT = Rule(
    "meta.shift", "distill", "warning", 0.2, "set meta.input=head, the input that the meta model learnt from"
)
CLOSING_FORGETS = Rule(
    "finetune.forgetting", "finetune", "warning", 1.2, "lower finetune.lr, or leave the closing rounds out: "
    "finetune.num_rounds=0",
)  # fmt: skip
FORGETTING = Rule(
    "distill.forgetting", "distill", "warning", 0.01,
    "set distill.guard=true; lower distill.lr or distill.backbone_lr, or raise distill.anchor_weight",
)  # fmt: skip
# Relative decrease of the loss from the last window but one to the last, together with an agreement below 0.9.
PLATEAU = Rule(
    "distill.plateau", "distill", "warning", 0.01,
    "raise distill.lr, or let the backbone learn too (distill.backbone_lr); see the teacher's accuracy",
)  # fmt: skip
UNGUARDED = Rule(
    "distill.unguarded", "distill", "warning", None,
    "set partition.validation_fraction, so that clients' images choose the state, or distill.guard=false",
)  # fmt: skip
STUDENT_UNCHANGED = Rule("distill.guarded", "distill", "info", None, "see the teacher's and the generators' findings")

# The limit is a time (runtime.client_timeout) and shows in no number: the same work gives the same result.
HUNG_CLIENT = Rule(
    "client.hung", "any", "warning", None,
    "look at its machine; a larger runtime.client_timeout waits longer, -1 for ever",
)  # fmt: skip
HUNG_SERVER = replace(HUNG_CLIENT, code="server.hung")

#: Steps in the window of the plateau rule, and the smallest window that it is applied to.
PLATEAU_WINDOW, PLATEAU_MIN_WINDOW = 100, 10
#: Effective number of owners below which a class counts as held by one client.
SINGLE_OWNER_BELOW = 1.05


def device_findings(device: str, num_gpus: float) -> list[Finding]:
    """Check that clients do not train on CPUs beside ``num_gpus`` idle GPUs; ``device``: "cpu" or "cuda"."""
    if device != "cpu" or num_gpus < 1:
        return []
    return [IDLE_GPUS.finding(f"clients train on CPUs, and GPUs stay idle beside them ({num_gpus:g})", num_gpus)]


def partition_findings(label_counts: Sequence[int]) -> list[Finding]:
    """Check that all classes have images; ``label_counts`` [C] are training images per class over all clients."""
    empty = [c for c, count in enumerate(label_counts) if count == 0]
    if not empty:
        return []
    return [EMPTY_CLASS.finding(f"no client holds {_classes(empty)}; nothing can be learnt of it", len(empty))]


def generator_findings(client: int, figures: Figures) -> list[Finding]:
    """Check one client's generator (docs/algorithm.md 4.1).

    Conditional generators are checked for label agreement and variety, others for mode collapse (if the client has two
    classes or more), variety and coverage. At most the first of these findings is reported, as it explains the rest.
    """
    found, owned = [], int(figures["owned_classes"])
    coverage, covered = figures["coverage"], figures.get("image_coverage", figures["coverage"])
    spread = figures["marginal_entropy"] / max(figures.get("label_entropy", 1.0), 1e-9)
    variety, agreement = figures.get("variety", 1.0), figures.get("label_agreement")
    if agreement is not None and agreement < _threshold(LOW_LABEL_AGREEMENT):
        message = f"{agreement:.0%} of its images show its classifier the class asked for"
        found.append(LOW_LABEL_AGREEMENT.finding(message, agreement, client=client))
    elif agreement is None and owned >= 2 and spread < _threshold(MODE_COLLAPSE):
        message = f"of its {owned} classes its images show one (their spread is {spread:.2f} of its labels')"
        found.append(MODE_COLLAPSE.finding(message, spread, client=client))
    elif variety < _threshold(LOW_VARIETY):
        message = f"its images are nearly one image ({variety:.1%} of the variety of real ones)"
        found.append(LOW_VARIETY.finding(message, variety, client=client))
    elif agreement is None and covered < _threshold(LOW_COVERAGE):
        shown = f"{coverage * owned:.0f} of its {owned} classes"
        message = f"it shows {shown}, and {covered:.0%} of its client's images are of these"
        found.append(LOW_COVERAGE.finding(message, covered, client=client))
    evaluated = figures.get("discriminator_accuracy", 0.0)
    if evaluated > _threshold(DISCRIMINATOR_OVERPOWER):
        message = f"its discriminator knows {evaluated:.1%} of real and of synthetic images apart"
        found.append(DISCRIMINATOR_OVERPOWER.finding(message, evaluated, client=client))
    out_of_range = figures.get("out_of_range", 0.0)
    if out_of_range > _threshold(OUT_OF_RANGE):
        message = f"{out_of_range:.0%} of the real images' values lie outside [-1, 1], which its tanh cannot reach"
        found.append(OUT_OF_RANGE.finding(message, out_of_range, client=client))
    return found


def prototype_findings(num_prototypes: Sequence[int], label_counts: Sequence[int]) -> list[Finding]:
    """Check that every class with images has prototypes; ``num_prototypes`` and ``label_counts`` are [C]."""
    missing = [c for c, n in enumerate(num_prototypes) if n == 0 and label_counts[c] > 0]
    return [MISSING_PROTOTYPES.finding(f"no prototype of {_classes(missing)}", len(missing))] if missing else []


def teacher_findings(
    figures: Figures, num_classes: int, single_owners: Sequence[int], *, name: str = "", holds_out: bool = True
) -> list[Finding]:
    """Check experts and meta model (docs/algorithm.md 4.2).

    ``single_owners``: classes that one client holds alone. ``name``: the architecture, if there are several.
    ``holds_out``: whether prototypes are configured to be held out. If the meta model diverged, its accuracy is not
    compared with the student's.
    """
    found, suffix = [], f" of {name}" if name else ""
    if single_owners:
        verb = "is" if len(single_owners) == 1 else "are each"
        message = f"{_classes(single_owners)} {verb} held by one client alone, and its model is the expert{suffix}"
        found.append(SINGLE_OWNER_CLASSES.finding(message, len(single_owners)))
    same = figures.get("expert_redundancy", 0.0)
    if same > _threshold(REDUNDANT_EXPERTS):
        message = f"the experts{suffix} of {same:.0%} of the pairs of classes are the same model"
        found.append(REDUNDANT_EXPERTS.finding(message, same))
    if holds_out and figures.get("num_held_out", 1.0) < 1:
        message = f"none{suffix} can be held out, so teacher and student are scored on their training prototypes"
        found.append(NO_HELD_OUT_PROTOTYPES.finding(message, 0.0))
    diverged = _diverged(figures, num_classes, suffix)
    if diverged:
        return [*found, diverged]
    reached, student = figures["meta_held_out_accuracy"], figures["student_held_out_accuracy"]
    if reached < student:
        message = (
            f"on held-out prototypes the teacher{suffix} is right on {reached:.1%}, the student it would teach on "
            f"{student:.1%}"
        )
        found.append(TEACHER_BELOW_STUDENT.finding(message, reached, threshold=student))
    return found


def _diverged(figures: Figures, num_classes: int, suffix: str) -> Finding | None:
    """Return an error if the returned teacher is unusable, a warning if an earlier state was selected instead."""
    guessing = math.log(max(2, num_classes))
    limit = _threshold(META_DIVERGED) * guessing
    handed_on, trained = figures["meta_held_out_loss"], figures.get("meta_train_loss", 0.0)
    named, there = figures.get("meta_classes_named", math.inf), figures.get("classes_judged", 0.0)
    if not handed_on <= limit:
        message = (
            f"the teacher{suffix} has a loss of {handed_on:.3g} on held-out prototypes; guessing has {guessing:.2f}"
        )
        return META_DIVERGED.finding(message, handed_on, threshold=limit)
    if named <= 1 < there:
        message = f"the teacher{suffix} names one class for held-out prototypes of {there:.0f} classes"
        return META_DIVERGED.finding(message, named, threshold=1.0)
    if not trained <= limit:
        message = f"its training{suffix} ended at a loss of {trained:.3g}; the state before it diverged is handed on"
        return META_DIVERGED.finding(message, trained, severity="warning", threshold=limit, advice="lower meta.lr")
    return None


def distill_findings(figures: Figures, share_held: float) -> list[Finding]:
    """Check synthetic images and student (docs/algorithm.md 4.3).

    ``share_held`` in (0, 1]: share of all classes that clients hold. Returns nothing if the teacher's outputs are not
    finite: ``teacher_findings`` reports that.
    """
    if not math.isfinite(figures.get("teacher_entropy", 0.0)):
        return []
    found, num_held = [], max(1.0, round(share_held * figures.get("num_classes", math.inf), 6))
    coverage = min(1.0, figures["class_coverage"] / share_held)
    if coverage < _threshold(UNSEEN_CLASSES):
        one = figures["class_coverage"] * figures.get("num_classes", math.inf) < 1.5 < num_held
        message = (
            "the teacher names one class for all synthetic images"
            if one
            else f"the teacher sees {coverage:.0%} of the classes in the synthetic images"
        )
        found.append(UNSEEN_CLASSES.finding(message, coverage, severity="error" if one else None))
    shift = figures.get("shift", 0.0)
    if shift > _threshold(INPUT_SHIFT):
        message = f"on {shift:.0%} of synthetic images the teacher says other than on the input that it was trained on"
        found.append(INPUT_SHIFT.finding(message, shift))
    before, after = figures["held_out_before"], figures["held_out_after"]
    if figures["step"] == 0:
        message = "no state on the way was better on held-out prototypes: the student that went in is handed back"
        found.append(STUDENT_UNCHANGED.finding(message, before))
    if figures.get("unguarded"):
        message = "the student's features moved and no validation images can choose its state: it is the last one"
        found.append(UNGUARDED.finding(message, figures["step"]))
    lost = before - after
    worse = figures.get("held_out_loss_after", math.inf) > figures.get("held_out_loss_before", 0.0)
    if lost > _threshold(FORGETTING) and worse:  # a guard by loss may hand back a slightly lower accuracy
        message = f"held-out prototypes fell from {before:.1%} to {after:.1%}"
        return [*found, FORGETTING.finding(message, lost)]
    improved, agreed = figures.get("improvement", 1.0), figures.get("late_agreement", 1.0)
    if improved < _threshold(PLATEAU) and agreed < 0.9:
        message = f"the loss stands still ({improved:+.1%} better at the end), with {agreed:.0%} agreement"
        found.append(PLATEAU.finding(message, improved))
    return found


def closing_findings(losses: Sequence[float]) -> list[Finding]:
    """Check the closing rounds by the clients' mean training loss in each of them.

    A loss that rises says that the rounds undo what the student has learnt: local steps of clients with few classes
    pull apart what the server had brought together.
    """
    if len(losses) < 2 or not losses[-1] > _threshold(CLOSING_FORGETS) * losses[0]:
        return []
    message = f"the clients' loss rose from {losses[0]:.3g} in the first closing round to {losses[-1]:.3g} in the last"
    return [CLOSING_FORGETS.finding(message, losses[-1] / losses[0] if losses[0] else math.inf)]


def format_finding(finding: Finding) -> str:
    """Format a finding with value, threshold and advice as the one line that ends a strict run."""
    number = "not finite" if finding.value is None else f"{finding.value:.4g}"
    limit = "" if finding.threshold is None else f", threshold {finding.threshold:.4g}"
    advice = f"; {finding.advice}" if finding.advice else ""
    return f"{finding.code}: {finding.message} (value {number}{limit}){advice}"


def _threshold(rule: Rule) -> float:
    assert rule.threshold is not None
    return rule.threshold


def _classes(labels: Sequence[int], most: int = 8) -> str:
    """Format class labels: ``class 3``, ``classes 0, 1, 7`` or ``classes 0, 1, ... (40 of them)``."""
    named = ", ".join(map(str, labels[:most]))
    more = f", ... ({len(labels)} of them)" if len(labels) > most else ""
    return f"class{'es' if len(labels) > 1 else ''} {named}{more}"
