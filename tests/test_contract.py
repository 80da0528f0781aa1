"""The outside contract: commands, knobs, names, errors, files and their keys, columns and stage keys.

``python tests/test_contract.py --write`` writes the golden files anew, for a change of the contract that is meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from cli_runner import ask
from helpers import FACTS

from mosaic_ray.cli.commands import mosaic
from mosaic_ray.config.presets import ALGORITHMS, SCALES, preset_knobs
from mosaic_ray.config.registry import CLASSIFIERS, DATASETS, METHODS, STRATEGIES
from mosaic_ray.config.resolve import KNOBS, as_dict, override, resolve
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.sweeps.space import list_spaces

CONTRACT = Path(__file__).parent / "golden" / "contract.json"
KEYS = CONTRACT.with_name("keys.json")
WRITE = "MOSAIC_WRITE_CONTRACT"


def as_before(section: str, found: dict[str, Any], path: Path = CONTRACT) -> None:
    """Compare ``found`` with the golden section of this name, or write it there."""
    found = json.loads(json.dumps(found))
    golden = json.loads(path.read_text()) if path.exists() else {}
    if not os.environ.get(WRITE):
        assert found == golden[section]
        return
    sections = []
    for name, entries in sorted((golden | {section: found}).items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def shape(value: Any) -> Any:
    """The keys of nested objects and the kinds of their values; a list is described by its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "number" if type(value) in (int, float) else type(value).__name__


def unstamped(name: str) -> str:
    """A file's name without digests, times, hosts and numbers of trials."""
    name = re.sub(r"-(?:[0-9a-f]{20}|[0-9a-f]{12})\b", "-DIGEST", name)
    name = re.sub(r"tfevents\.(?!9{10}\.)\d+\..*", "tfevents.STAMP", name)
    return re.sub(r"p\d{3}s\d+", "TRIAL", name)


def files_below(folder: Path) -> list[str]:
    return sorted({unstamped(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()})


# --- the command -----------------------------------------------------------------------------------------------------


def parameters(command: click.Command) -> dict[str, Any]:
    """Flags, kinds and defaults of a command's options, and its arguments in order; no help texts."""
    described: dict[str, Any] = {"arguments": [], "options": {}}
    for parameter in command.params:
        default = parameter.default if isinstance(parameter.default, str | int | float | bool) else None
        facts = {
            "type": parameter.type.name, "metavar": parameter.metavar, "default": default, "nargs": parameter.nargs,
            "required": parameter.required, "multiple": parameter.multiple,
        }  # fmt: skip
        if isinstance(parameter, click.Option):
            flag = {"is_flag": parameter.is_flag, "hidden": parameter.hidden}
            described["options"][" ".join([*parameter.opts, *parameter.secondary_opts])] = facts | flag
        else:
            described["arguments"].append({"name": parameter.name} | facts)
    return described


def commands(command: click.Command, path: str) -> dict[str, Any]:
    found = {path: parameters(command)}
    for name, below in sorted(getattr(command, "commands", {}).items()):
        found |= commands(below, f"{path} {name}")
    return found


def test_commands_and_their_options_stay():
    as_before("commands", commands(mosaic, "mosaic"))


#: In the project's own sentences: click's differ between its versions.
REFUSED = [
    "rnu",
    "run --dataset cfar10",
    "run --preset cifar",
    "run --algorithm fixd",
    "run --method mosiac",
    "run --host rya",
    "run --omega 0",
    "run --clients 2.5",
    "run --omega 1 --set partition.omega=2",
    "run --address nowhere",
    "run --config no/such.toml",
    "run --set warmup.lr",
    "run --set warmpu.lr=1",
    "run --set warmup.lr=fast",
    "run --set warmup.shuffle=3",
    "run --set runtime.precision=fp16",
    "run --set federation.widths=[1.0,1.5]",
    "run --set federation.widths=[1.0,0.5]",
    "run --set federation.cohort_size=11 --clients 10",
    "run --set federation.min_cohort=11 --clients 10",
    "run --set model.classifier=vgg",
    "run --set model.classifiers=[cnn,resnet18] --clients 3",
    "run --set federation.optimiser=fedrolex --set federation.widths=[1.0,0.5] --set prototypes.rounds=all",
    "run --set generator.conditional=true --set generator.drop_class0_bug=true",
    "partition --dataset digits --clients 2000",
    "show dmeo",
    "sweep --space smok",
    "sweep --search greedy",
    "sweep --scheduler hyper",
    "compare --methods mosiac",
    "doctor --space smoke",
    "data fetch cfar10",
    "report no/such/run",
    "store gc --storage no/such",
    "experiment moe-weights --seeds x",
]


@pytest.mark.usefixtures("two_cpus")
def test_refusals_stay():
    as_before("refusals", {words: refused(words) for words in REFUSED})


def refused(words: str) -> list[Any]:
    """Exit status and the whole of standard error; standard output stays empty."""
    result = ask(*shlex.split(words))
    assert result.stdout == "", words
    return [result.exit_code, result.stderr]


# --- knobs and names -------------------------------------------------------------------------------------------------


def test_knobs_stay():
    limits = ("low", "above", "high", "choices")
    as_before(
        "knobs",
        {
            name: {"type": str(knob.type), "default": knob.default} | {limit: knob.metadata[limit] for limit in limits}
            for name, knob in KNOBS.items()
        },
    )


def test_presets_stay():
    pairs = [(scale, algorithm) for scale in SCALES for algorithm in ALGORITHMS]
    as_before("presets", {"+".join(pair): preset_knobs(*pair) for pair in pairs})
    resolved = {"+".join(pair): as_dict(resolve("+".join(pair))) for pair in pairs}
    as_before("resolved", {name: digest(config) for name, config in resolved.items()})


def digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def test_names_stay():
    as_before(
        "names",
        {
            "data sets": list(DATASETS), "methods": {name: method[0] for name, method in METHODS.items()},
            "optimisers": list(STRATEGIES), "classifiers": list(CLASSIFIERS), "scales": list(SCALES),
            "algorithms": list(ALGORITHMS), "spaces": sorted(list_spaces()),
        },
    )  # fmt: skip


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_of_a_run_stay(undisturbed_tiny):
    folder = Path(undisturbed_tiny["paths"]["run"])
    below = {"run": files_below(folder), "storage": files_below(folder.parents[1])}
    below["storage"] = [name for name in below["storage"] if not name.startswith("runs/")]
    as_before("files", below)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"].keys() == as_dict(ExperimentConfig()).keys()
    found = {key: shape(value) for key, value in summary.items() if key not in ("config", "health")}
    as_before("summary", found | {"health": sorted(summary["health"][0])})  # which findings come first may differ
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tags = {re.sub(r"\d+", "N", line["tag"]) for line in lines}
    as_before("metrics", {"tags": sorted(tags), "keys": sorted({key for line in lines for key in line})})


@pytest.mark.usefixtures("two_cpus")
def test_files_of_a_sweep_stay(trials):
    result = ask("sweep", "--space", "smoke", "--name", "n", "--json")
    assert result.exit_code == 0, result.stderr
    folder = Path("mosaic_runs/sweeps/n")
    plan = json.loads((folder / "plan.json").read_text())
    columns = [[field.name, str(field.type)] for field in pq.read_schema(folder / "results.parquet")]
    outcome = json.loads(result.stdout)
    found = {
        "files": files_below(folder), "plan.json": sorted(plan), "results.parquet": columns,
        "results.csv": (folder / "results.csv").read_text().splitlines()[0].replace('"', "").split(","),
        "--json": sorted(outcome), "--json trials": sorted(outcome["trials"][0]),
    }  # fmt: skip
    as_before("sweep", found)


# --- stage keys ------------------------------------------------------------------------------------------------------

NARROW = {"federation.optimiser": "fedrolex", "federation.widths": [1.0, 0.5]}
MIXED = {"model.classifier": "cnn", "model.classifiers": ["cnn", "resnet18"], "partition.num_clients": 4}
ABSENT = {"federation.cohort_size": 4, "federation.drop_rate": 0.25, "federation.min_cohort": 2}

#: Preset (None: the defaults alone) and knobs on top of it.
CONFIGS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "defaults": (None, {}),
    "fixed": ("demo+fixed", {}),
    "demo+paper": ("demo+paper", {}),
    "demo+reference": ("demo+reference", {}),
    "narrow": ("demo+distilled", NARROW),
    "mixed": ("demo+distilled", MIXED),
    "conditional": ("demo+distilled", {"generator.conditional": True}),
    "prototypes of all rounds": ("demo+distilled", {"prototypes.rounds": "all"}),
    "absent clients": ("demo+distilled", ABSENT),
    "fedavg": ("demo+distilled", {"method": "fedavg"}),
    "prototype_head": ("demo+distilled", {"method": "prototype_head"}),
}


def keys_of(preset: str | None, knobs: dict[str, Any]) -> dict[str, Any]:
    """Keys for data that are held fixed; clients hold from 100 samples on, so that some reach generator.tau."""
    config = ExperimentConfig() if preset is None else resolve(preset)
    config = override(config, knobs | {"runtime.precision": "fp32"})
    sizes = [100 * (client + 1) for client in range(config.partition.num_clients)]
    return stage_keys(config, "stripes", FACTS, sizes)


def test_stage_keys_stay():
    as_before("keys", {name: keys_of(*asked) for name, asked in CONFIGS.items()}, KEYS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_contract.py --write")
    os.environ[WRITE] = "1"
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", __file__]))
