"""Write the card of a model's folder (README.md): data, partition, configuration, accuracy, citation, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tomli_w

from ..config import plugins
from ..config.resolve import KNOBS, dotted
from ..core.about import About, Paper
from ..core.errors import RequestError
from ..core.text import visible
from ..data.modality_sources import VOCABULARY
from ..methods.mosaic.method import MOSAIC
from ..storage.hashing import plain
from .export import _md, _md_row
from .load import RunReport
from .text import ROLE_NAMES, percent, points

#: Knobs that say where files lie on the author's machine, or where work ran.
_PRIVATE = ("data.root", "data.name", "preset")

#: What the shape of a modality counts, and the form in which a model takes it.
_UNITS = {"image": "pixels", "vector": "numbers", "text": "tokens"}
_FORMS = {
    "image": "images uint8, or floats in [0, 1], [N, C, H, W]", "vector": "float32 [N, d]",
    "text": "tokens int64 [N, L], such as model.tokens(texts)",
}  # fmt: skip


def card(run: RunReport, config: Mapping[str, Any]) -> str:
    """Return the card, in Markdown, of the model of ``run`` that ``config`` describes."""
    role, data, counts = config["role"], config["data"], run.label_counts
    head = {"library_name": "mosaic_ray", "pipeline_tag": config["pipeline_tag"],
            "tags": ["federated-learning", "mosaic_ray", plain(config["method"])]}  # fmt: skip
    names = config["class_names"]
    clients, omega = run.knob("partition.num_clients"), run.knob("partition.omega")
    noun = "samples" if data.get("modalities") else "images"
    held = f", {int(counts.sum()):,} training {noun}" if counts is not None else ""
    parts = [
        f"---\n{_yaml(head)}---\n",
        f"# {_md(config['run'])}: {_md(role)}\n",
        f"{_what(role)}, made by [mosaic_ray](https://arxiv.org/abs/2505.19699) {config['mosaic_ray_version']}: "
        f"method {_md(config['method'])}, strategy {_md(str(run.knob('federation.strategy')))}, "
        f"seed {config['seed']}. The status of the run is {run.status}.\n",
        "## Use\n",
        f"```python\nimport mosaic_ray as mr\nfrom huggingface_hub import snapshot_download\n\n{_snippet(config)}```\n",
        "## Accuracy\n",
        _accuracy(run, role),
        "## Data and partition\n",
        f"{_md(data['name'])}: {data['num_classes']} classes, {_samples(data)}{held}, dealt "
        f"to {clients} clients by the sampler {_md(str(run.knob('partition.sampler')))} with omega {omega}.\n",
        *_modalities(run, data),
        *([f"Classes: {', '.join(map(_md, names))}.\n"] if names else []),
        "## Configuration\n",
        f"All knobs that differ from their defaults:\n\n```toml\n{_knobs(run)}```\n",
        "## Limits\n",
        "One seed, one partition. Test images were used for reporting alone. The weights were trained on clients' "
        "images and may reveal some of them, a generator's most of all.\n",
        "No license is given here. The terms of the data set hold for what was trained on it; add a license before "
        "others use the model.\n",
        "## Citation\n",
        f"```bibtex\n{_bibtex(run)}\n```\n",
    ]
    return visible("\n".join(parts))


def _samples(data: Mapping[str, Any]) -> str:
    """Return the form of a sample in words."""
    side, parts = data["image_size"], data.get("modalities", ())
    if not parts:
        return f"{data['channels']} x {side} x {side} pixels"
    return "samples of " + ", ".join(
        f"{_md(part['name'])} ({' x '.join(map(str, part['shape']))} {_UNITS[part['kind']]})" for part in parts
    )


def _modalities(run: RunReport, data: Mapping[str, Any]) -> list[str]:
    """Return what is to be known of samples of several modalities."""
    parts = data.get("modalities", ())
    if not parts:
        return []
    given = run.knob("partition.modalities")
    held = _md(given if isinstance(given, str) else ", ".join(given)) if given else "all of them"
    lines = [
        f"Modalities of the clients (`partition.modalities`): {held}. Test accuracy is the mean over the sets of "
        "modalities that a sample may have.\n"
    ]
    if any(part["kind"] == "vector" for part in parts):
        lines.append("Vectors are taken in the data set's units; the model standardises them.\n")
    if any(part["vocabulary"] == VOCABULARY for part in parts):
        lines.append("A text is the bytes of its UTF-8, each plus 1, cut or filled with 0 to its length.\n")
    return lines


def _what(role: str) -> str:
    kind, _, number = role.partition(":")
    if kind == "generator":
        return f"The generator of client {number}"
    if kind == "client":
        return f"The model of client {number} after the warm-up"
    return f"The model `{role}` ({ROLE_NAMES.get(role, role)})"


def _yaml(head: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in head.items())  # JSON is YAML


def _snippet(config: Mapping[str, Any]) -> str:
    own = ", own_code=True" if ":" in str(config.get("network", "")) else ""
    lines = [f'model = mr.load_model(snapshot_download("OWNER/NAME"){own})  # or the path of this folder']
    if parts := config["data"].get("modalities", ()):
        names = [json.dumps(part["name"]) for part in parts]
        if "generator" in config:
            lines += [f"samples = model(16)  # by name, those that its client holds of {', '.join(names)}"]
        else:
            forms = [f"{name}: {_FORMS[part['kind']]}" for name, part in zip(names, parts, strict=True)]
            lines += ["# samples: a dict with one or more of", *(f"#   {form}" for form in forms)]
            lines += ["logits = model(samples)"]
    elif "generator" in config:
        lines += ["images = model(16)  # uint8 [16, C, H, W]"]
    else:
        lines += ["logits = model(images)  # images uint8, or floats in [0, 1]: [N, C, H, W]"]
    return "\n".join(lines) + "\n"


def _accuracy(run: RunReport, role: str) -> str:
    """Return a table of the run's accuracies: the model's own is bold, what it has to beat stands beside it."""
    rows = [_md_row(["model", "what it is", "test accuracy"]), _md_row(["---", "---", "---:"])]
    for name, value in (run.summary.accuracy or {}).items():
        if value is not None:
            bold = "**" if name == role else ""
            what = _md(ROLE_NAMES.get(name, ""))
            rows.append(_md_row([f"{bold}{_md(name)}{bold}", what, f"{bold}{percent(value)}{bold}"]))
    text = "\n".join(rows) + "\n" if len(rows) > 2 else "The run reports no accuracy.\n"
    if run.gain is not None:
        text += f"\nFinal minus control: {points(run.gain)} points.\n"
    kind, _, number = role.partition(":")
    own = run.summary.client_accuracy.clients.get("own", []) if run.summary.client_accuracy else []
    if kind == "client" and int(number) < len(own) and own[int(number)] is not None:
        text += f"\n**This client's model**, on its own mix of classes: **{percent(own[int(number)])}**.\n"
    return text


def _knobs(run: RunReport) -> str:
    values = {n: v for n, v in dotted(run.config).items() if n not in _PRIVATE and n in KNOBS and _differs(n, v)}
    return tomli_w.dumps(values)


def _differs(name: str, value: Any) -> bool:
    default = KNOBS[name].default
    return bool(value != (list(default) if isinstance(default, tuple) else default))


def _bibtex(run: RunReport) -> str:
    """Return the papers of Mosaic, of the run's method and of its strategies."""
    papers: dict[str, Paper] = {paper.key: paper for paper in MOSAIC.about.papers}
    words = [("strategies", word) for word in plugins.parts(str(run.knob("federation.strategy") or "fedavg"))]
    for kind, word in [("methods", str(run.knob("method"))), *words]:
        try:
            about = getattr(plugins.load(kind, word), "about", None)
        except RequestError:  # a plug-in that is not at hand
            continue
        papers |= {paper.key: paper for paper in about.papers} if isinstance(about, About) else {}
    return "\n\n".join(paper.bibtex() for paper in papers.values())
