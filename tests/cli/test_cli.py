"""The `mosaic` command: wrong options are refused in one line with exit status 2, valid ones become a config."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from cli_runner import ask, refusal

from mosaic_ray import __version__
from mosaic_ray.cli import commands, group
from mosaic_ray.cli.request import KNOB_OF_OPTION, parse_config
from mosaic_ray.config.presets import ALGORITHMS, SCALES
from mosaic_ray.config.registry import CLASSIFIERS, METHODS, STRATEGIES
from mosaic_ray.config.resolve import KNOBS, read_toml, resolve
from mosaic_ray.core.errors import RequestError, RunError
from mosaic_ray.data.partition import skew

REPO = Path(__file__).resolve().parents[2]


SUMMARY = {
    "method": "mosaic",
    "seed": 0,
    "accuracy": {"initial": 0.5, "teacher": None, "distilled": 0.6, "final": 0.75, "control": 0.7},
}


WRONG = [
    ("run --dataset cfar10", ["--dataset cfar10", '"cifar10"']),
    ("run --dataset parquet:", ["--dataset parquet:", "parquet:PATH"]),
    ("run --preset cifar", ["--preset cifar", '"cifar10"']),
    ("run --preset demo+papr", ["papr", '"paper"']),
    ("run --algorithm fixd", ["--algorithm fixd", "fixed, distilled, paper, reference"]),
    ("run --method mosiac", ["--method mosiac", '"mosaic"']),
    ("run --host rya", ["--host rya", "runtime.host", "ray, serial"]),
    ("run --omega abc", ["--omega abc", "partition.omega", "a number above 0"]),
    ("run --omega 0", ["--omega 0", "above 0"]),
    ("run --omega -1", ["--omega -1", "above 0"]),
    ("run --omega nan", ["--omega nan", "a number"]),
    ("run --omega ''", ["--omega", "a number"]),
    ("run --clients 2.5", ["--clients 2.5", "whole number"]),
    ("run --clients 0", ["--clients 0", "at least 1"]),
    ("run --seed x", ["--seed x:", "whole number"]),
    ("run --seed -1", ["--seed -1:", "at least 0"]),
    ("run --set warmup.lr", ["--set warmup.lr", "KEY=VALUE"]),
    ("run --set =3", ["--set =3", "KEY=VALUE"]),
    ("run --set warmpu.lr=1", ['"warmpu.lr"', '"warmup.lr"']),
    ("run --set lr=1", ['"lr"', "lr"]),
    ("run --set warmup.lr=fast", ["warmup.lr = fast", "a number"]),
    ("run --set warmup.num_rounds=1.5", ["warmup.num_rounds = 1.5", "whole number"]),
    ("run --set warmup.shuffle=3", ["warmup.shuffle = 3", "true or false"]),
    ("run --set generator.lambda_e=-1", ["generator.lambda_e = -1", "at least 0"]),
    ("run --set generator.lambda_d=-0.1", ["generator.lambda_d = -0.1", "at least 0"]),
    ("run --set generator.lambda_i=-1e-3", ["generator.lambda_i = -1e-3", "at least 0"]),
    ("run --set generator.tau=-300", ["generator.tau = -300", "at least 0"]),
    ("run --set federation.widths=[1.0,1.5]", ["federation.widths", "at most 1"]),
    ("run --set federation.widths=[0.0]", ["federation.widths", "above 0"]),
    ("run --set federation.widths=[]", ["federation.widths", "list of numbers"]),
    ("run --set federation.optimiser=fedavgg", ["federation.strategy = fedavgg", "fedavg"]),
    ("run --omega 1 --set partition.omega=2", ["--omega 1", "partition.omega=2", "one of them"]),
    ("run --address nowhere", ["--address nowhere", "HOST:PORT"]),
    ("run --address host:99999", ["--address host:99999", "HOST:PORT"]),
    ("run --config no/such.toml", ["--config no/such.toml", "No such file"]),
    ("run --config .", ["--config .", "directory"]),
    ("partition --sampler drichlet", ["--sampler drichlet", "partition.sampler", "reference, dirichlet"]),
    ("partition --png README.md/x.png", ["--png README.md/x.png", "folder is a file", "name a file"]),
    ("partition --json --png .", ["--png .", "directory", "name a file"]),
    ("partition --sampler pathological --clients 4", ["partition.classes_per_client = 2", "partition.num_clients = 4"]),
    ("show dmeo", ["dmeo", '"demo"']),
    ("rnu", ['"rnu"', '"run"']),
    ("run --omgea 1", ["--omgea", "--omega"]),
    ("run --omega", ["--omega", "argument"]),
    ("run extra", ["extra"]),
    ("show", ["PRESET"]),
    ("--vresion", ["--vresion", "--version"]),
]


@pytest.mark.parametrize("words, parts", WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_option_is_refused_in_one_line(words, parts):
    line = refusal(ask(*shlex.split(words)))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "text, part",
    [
        ("[warmup\nlr = 1", "line 1"),
        ("[warmup]\nlr = 1e", "line 2"),
        ("[warmpu]\nlr = 0.1", '"warmup.lr"'),
        ("[warmup]\nlr = 'fast'", 'warmup.lr = "fast"'),
        ("[warmup]\nlr = -0.5", "above 0"),
        ("warmup = 3", "warmup"),
        ("preset = 'dmeo'", '"demo"'),
        ("preset = 3", "preset"),
        ("algorithm = [1]", "algorithm"),
        ("\udcff", "utf-8"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, part):
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert part in refusal(ask("run", "--config", str(path)))


@pytest.mark.parametrize("way", [["-m", "mosaic_ray"], ["cli.py"]])
def test_a_process_refuses_before_anything_heavy_is_loaded(way):
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", *way, "run", "--omega", "abc"], capture_output=True, text=True, cwd=REPO
    )
    times = [line for line in loaded.stderr.splitlines() if line.startswith("import time:")]
    assert not [line for line in times if re.search(r"\| +(torch|ray|numpy)$", line)]
    assert [line for line in times if re.search(r"\| +click$", line)]
    loaded.stderr = "".join(f"{line}\n" for line in loaded.stderr.splitlines() if line not in times)
    assert "--omega abc" in refusal(loaded)


def test_more_clients_than_samples_cannot_be_dealt():
    line = refusal(ask("partition", "--dataset", "digits", "--clients", "2000"))
    assert "num_clients" in line or "--clients" in line
    assert "2000" in line


def test_a_number_beyond_all_floats_is_refused():
    assert "above 0" in refusal(ask("run", "--omega", "1" * 400))


def test_line_breaks_in_a_value_stay_in_one_line():
    assert "a b" in refusal(ask("run", "--dataset", "a\nb"))


# --- right words -----------------------------------------------------------------------------------------------------


def test_options_are_spellings_of_knobs():
    assert set(KNOB_OF_OPTION.values()) <= set(KNOBS)
    words = {"dataset": "mnist", "clients": "7", "omega": ".5", "method": "fedavg", "seed": "3", "host": "serial"}
    config = parse_config(**words, preset="demo", sets=["warmup.lr=1e-4", "federation.widths=[1.0]"])
    expected = resolve(
        sets={
            "data.name": "mnist", "partition.num_clients": "7", "partition.omega": "0.5", "method": "fedavg",
            "seed": "3", "runtime.host": "serial", "warmup.lr": "0.0001", "federation.widths": "[1.0]",
        }
    )  # fmt: skip
    assert config == expected


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("preset = 'fmnist_small'\n[partition]\nomega = 2.0\n")
    assert parse_config(config=str(path)).data.name == "fmnist"
    assert parse_config(preset="cifar10_small", config=str(path)).data.name == "cifar10"
    assert parse_config(config=str(path)).partition.omega == 2.0
    assert parse_config(config=str(path), omega="3").partition.omega == 3.0
    assert parse_config(sets=["seed=1", "seed=2"]).seed == 2
    assert parse_config(omega="3", sets=["partition.omega=3"]).partition.omega == 3.0


def test_values_may_hold_equals_signs():
    assert parse_config(sets=["data.root=/a=b"]).data.root == "/a=b"


@pytest.mark.parametrize("preset", [*SCALES, *ALGORITHMS, "cifar100+reference"])
def test_show_prints_what_config_reads_back(tmp_path, preset):
    shown = ask("show", preset)
    assert shown.exit_code == 0
    path = tmp_path / "shown.toml"
    path.write_text(shown.stdout)
    assert resolve(file=read_toml(path)) == resolve(preset)


@pytest.mark.parametrize(
    "command, names",
    [("presets", [*SCALES, *ALGORITHMS]), ("methods", [*METHODS, *STRATEGIES, *CLASSIFIERS])],
)
def test_lists_name_everything(command, names):
    result = ask(command)
    assert result.exit_code == 0
    for name in names:
        assert re.search(rf"^ +{name} ", result.stdout, re.MULTILINE), name


def test_version_and_help():
    assert ask("--version").stdout == f"mosaic {__version__}\n"
    assert ask().stdout == ask("--help").stdout == ask("-h").stdout
    assert ask().exit_code == 0


def test_cli_py_is_the_same_command():
    spec = importlib.util.spec_from_file_location("checkout", REPO / "cli.py")
    checkout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checkout)
    assert (checkout.main, checkout.mosaic) == (commands.main, commands.mosaic)


def test_partition_as_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ask("partition", "--dataset", "digits", "--clients", "5", "--omega", "0.1", "--seed", "2", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert sorted(facts) == ["client_sizes", "label_counts", "sampler", "seed"]
    assert (facts["sampler"], facts["seed"]) == ("reference", 2)
    assert [len(row) for row in facts["label_counts"]] == [10] * 5
    assert [sum(row) for row in facts["label_counts"]] == facts["client_sizes"]
    assert sum(facts["client_sizes"]) == 1437
    assert not list(tmp_path.iterdir())


def test_partition_as_a_table_and_a_heat_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["partition", "--dataset", "digits", "--clients", "3", "--omega", "1"]
    counts = json.loads(ask(*words, "--json", "--png", "with.png").stdout)["label_counts"]
    lines = ask(*words).stdout.splitlines()
    rows = [line.split() for line in lines]
    for client, row in enumerate(counts):
        assert [str(client), *(str(n or ".") for n in row), str(sum(row))] in rows
    place = "./mosaic_runs/partitions/digits-reference-omega1-3clients-s0.png"
    assert lines[-2:] == [f"skew {skew(np.array(counts)):.2f} of 2.30 nats", f"heat map {place}"]
    assert Path(place).read_bytes() == Path("with.png").read_bytes()
    assert Path(place).read_bytes().startswith(b"\x89PNG")


def test_every_sampler_is_named_and_deals():
    text = " ".join(ask("partition", "--help").stdout.split())
    for sampler in KNOBS["partition.sampler"].metadata["choices"]:
        assert re.search(rf"How labels are dealt:.*\b{sampler}\b", text)
        facts = json.loads(ask("partition", "--sampler", sampler, "--json").stdout)
        assert facts["sampler"] == sampler
        assert sum(facts["client_sizes"]) == 1437


# --- run: what reaches the launch, and how it ends -------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Stands in for mosaic_ray.runs.runner; ``outcome`` is returned or raised, ``calls`` are kept."""
    stand_in = types.ModuleType("mosaic_ray.runs.runner")
    stand_in.calls, stand_in.outcome = [], SUMMARY

    def run(config, **options):
        stand_in.calls.append((config, options))
        print("progress", flush=True)
        if isinstance(stand_in.outcome, BaseException):
            raise stand_in.outcome
        return stand_in.outcome

    stand_in.run = run
    monkeypatch.setitem(sys.modules, "mosaic_ray.runs.runner", stand_in)
    monkeypatch.setattr("mosaic_ray.runs.runner", stand_in, raising=False)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mosaic"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return stand_in


def test_run_passes_its_options_on(launched):
    result = ask("run", "--omega", "2", "--storage", "s3://b/c", "--name", "mine", "--fresh")
    assert result.exit_code == 0, result.stderr
    [(config, options)] = launched.calls
    assert config == resolve(sets={"partition.omega": "2"})
    command = ["/somewhere/bin/mosaic", "run", "--omega", "2", "--storage", "s3://b/c", "--name", "mine"]
    asked = {"storage": "s3://b/c", "name": "mine", "address": "local", "fresh": True, "command": command}
    asked |= {"strict_health": False, "track": ()}
    assert options == asked
    assert "75.0 %" in result.stdout
    assert "+5.0 points" in result.stdout


def test_json_alone_on_standard_output(launched):
    result = ask("run", "--json")
    assert json.loads(result.stdout) == SUMMARY
    assert result.stderr == "progress\n"


@pytest.mark.parametrize(
    "word, variable, address",
    [(None, "", "local"), (None, "1.2.3.4:6379", "auto"), ("local", "1.2.3.4:6379", "local")]
    + [(word, "", word) for word in ("auto", "10.0.0.1:6379", "head.lan:6379", "ray://head:10001", "[::1]:6379")],
)
def test_addresses(launched, monkeypatch, word, variable, address):
    monkeypatch.setenv("RAY_ADDRESS", variable)
    result = ask("run", *([] if word is None else ["--address", word]))
    assert result.exit_code == 0, result.stderr
    assert launched.calls[0][1]["address"] == address


def test_a_failed_run_says_where_in_one_line(launched):
    launched.outcome = RunError("loss is\nnan", stage="warmup", round=3, client=1)
    launched.outcome.add_note("log: /s/runs/r/metrics.jsonl")
    result = ask("run", "--json")
    result.stderr_bytes = result.stderr_bytes.replace(b"progress\n", b"")
    line = refusal(result, status=1)
    assert line == "mosaic: error: stage warmup, round 3, client 1: loss is nan; log: /s/runs/r/metrics.jsonl\n"


def test_a_late_refusal_has_the_same_form(launched):
    launched.outcome = RequestError("--storage: no space")
    result = ask("run", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == "mosaic: error: --storage: no space"


def test_an_interrupted_run_names_the_command_that_resumes(launched):
    launched.outcome = KeyboardInterrupt()
    result = ask("run", "--omega", "2", "--fresh", "--name", "it's")
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert last == """mosaic: interrupted; to resume: /somewhere/bin/mosaic run --omega 2 --name 'it'"'"'s'"""


@pytest.mark.parametrize(
    "typed, argv, program",
    [
        (["python3", "-m", "mosaic_ray", "run"], ["/p/mosaic_ray/__main__.py", "run"], ["python3", "-m", "mosaic_ray"]),
        (["python", "cli.py", "run"], ["cli.py", "run"], ["python", "cli.py"]),
        (["/v/bin/python", "/v/bin/mosaic", "run"], ["/v/bin/mosaic", "run"], ["/v/bin/mosaic"]),
    ],
)
def test_the_command_is_named_as_it_was_reached(monkeypatch, typed, argv, program):
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setattr(sys, "argv", argv)
    assert group.resume_command(["run"]) == [*program, "run"]


def test_on_the_path_the_script_goes_by_its_name(monkeypatch, tmp_path):
    script = tmp_path / "mosaic"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script), "run"])
    assert group.resume_command(["run"]) == ["mosaic", "run"]
