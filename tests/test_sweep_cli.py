"""`mosaic sweep` and `mosaic spaces` at the door: what is refused, in one line and before Ray; what gets through."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mosaic_ray import cli as door
from mosaic_ray import sweep_launch
from mosaic_ray.config import ExperimentConfig, as_dict, flatten, override, resolve
from mosaic_ray.errors import RequestError
from mosaic_ray.report.sweeps import read_results
from mosaic_ray.runtime import cluster, precision
from mosaic_ray.runtime.resources import Node
from mosaic_ray.runtime.store import Store
from mosaic_ray.spaces import Choice, Range, SweepPlan, list_spaces, load_space
from mosaic_ray.sweep_launch import Request, prepare, resources_of

REPO = Path(__file__).resolve().parents[1]
SMOKE = ["--space", "smoke", "--name", "n"]
VALID = override(ExperimentConfig(), {"partition.validation_fraction": 0.1})


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch, tmp_path):
    """A machine of 2 CPUs and 8 GiB on which Ray cannot be imported; an empty working directory."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(cluster, "local_resources", lambda: cluster.Resources(2, 0, 8 * 2**30))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def ask(*words: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(door.mosaic, words)


def sweep(*words: str) -> Result:
    return ask("sweep", *words)


def refusal(result: Result) -> str:
    """The one line of a wrong request."""
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("mosaic: error: ")
    return result.stderr


def files(folder: Path = Path()) -> dict[str, bytes]:
    """All that lies below the working directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- wrong words -----------------------------------------------------------------------------------------------------

WRONG = [
    ("--samples 0", ["--samples 0:", "at least 1"]),
    ("--samples -1", ["--samples -1:", "at least 1"]),
    ("--samples 2.5", ["--samples 2.5:", "whole number"]),
    ("--samples ''", ["--samples", "whole number"]),
    ("--samples ٣", ["--samples", "whole number"]),
    (f"--samples {'1' * 5000}", ["whole number"]),
    ("--samples 4 --search grid", ["--samples 4:", "grid", "--search random"]),
    ("--samples 4 --space smoke", ["--samples 4:", "grid", "--search random"]),
    ("--max-concurrent 0", ["--max-concurrent 0:", "at least 1"]),
    ("--max-concurrent two", ["--max-concurrent two:", "whole number"]),
    ("--space smok", ["--space smok:", '"smoke"']),
    ("--space nowhere", ["--space nowhere:", "unknown space"]),
    ("--space no_such_lab:plan", ["--space no_such_lab:plan:", 'no module "no_such_lab"']),
    ("--space tune_spaces.smoke:plna", ["--space tune_spaces.smoke:plna:", '"plan"']),
    ("--space missing.py", ["--space missing.py:", "No such file"]),
    ("--search anneal", ["--search anneal:", "grid, random, optuna"]),
    ("--scheduler hyperband", ["--scheduler hyperband:", "fifo, asha"]),
    ("--seeds 0,x", ["--seeds 0,x:", "0,1,2"]),
    ("--seeds ''", ["--seeds", "0,1,2"]),
    ("--seeds 0,,1", ["--seeds 0,,1:", "0,1,2"]),
    ("--seeds 1,1", ["--seeds 1,1:", "each once"]),
    ("--seeds 0,00", ["--seeds 0,00:", "each once"]),
    ("--seeds=-1", ["--seeds -1:", "0,1,2"]),
    ("--seeds 1.5", ["--seeds 1.5:", "0,1,2"]),
    ("--seeds 9999999999", ["--seeds 9999999999:", "at most"]),
    (f"--seeds {'1' * 5000}", ["whole numbers"]),
    ("--seed 1 --seeds 0,1", ["--seeds 0,1:", "1 as well", "one of them"]),
    ("--set seed=1 --seeds 0,1", ["--seeds 0,1:", "1 as well", "one of them"]),
    ("--seed x --seeds 0,1", ["--seed x:", "whole number"]),
    ("--json --dry-run", ["--json:", "--dry-run"]),
    ("--name a/b", ["--name a/b:", "sweeps/"]),
    ("--name ..", ["--name ..:", "sweeps/"]),
    ("--address nowhere", ["--address nowhere:", "HOST:PORT"]),
    ("--omega abc", ["--omega abc", "partition.omega"]),
    ("--preset dmeo", ["--preset dmeo", '"demo"']),
    ("--scheduler asha --set partition.validation_fraction=0", ["--scheduler asha:", "partition.validation_fraction"]),
    ("--search optuna --set partition.validation_fraction=0", ["--search optuna:", "partition.validation_fraction"]),
    ("--search optuna --space ablation", ["--search optuna:", "ablation", "--search grid"]),
    ("--search random --space ablation", ["--search random:", "--search grid"]),
    ("--search optuna --space omega_ladder", ["--search optuna:", "partition.omega", "--search grid"]),
    ("--space smoke --omega 2", ["--omega 2:", "smoke", "partition.omega"]),
    ("--space smoke --set generator.lambda_d=3", ["--set generator.lambda_d=3:", "smoke"]),
    ("--space client_count --set federation.cohort_size=15", ["federation.cohort_size = 15", "5 clients"]),
    ("--set runtime.cpus_per_client=64", ["runtime.cpus_per_client = 64", "at most"]),
    ("--set distill.workers=2", ["distill.workers = 2", "at most 1"]),
    ("--search optuna --set distill.workers=2", ["distill.workers = 2", "at most 1"]),
    ("--set runtime.gpus_per_client=0.5", ["runtime.gpus_per_client = 0.5", "0 runs clients on CPUs"]),
]  # fmt: skip


@pytest.mark.parametrize("words, told", WRONG, ids=[words[:60] for words, _ in WRONG])
def test_a_wrong_word_is_answered_in_one_line_and_nothing_is_written(words, told):
    line = refusal(sweep(*shlex.split(words)))
    for part in told:
        assert part in line
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "words",
    ["--samples 0", "--name a/b", "--set runtime.cpus_per_client=64", "--space smoke --samples 4", "--space nowhere"],
)
def test_a_dry_run_refuses_what_a_sweep_would(words):
    assert refusal(sweep("--dry-run", *words.split())) == refusal(sweep(*words.split()))


PLAN = "from mosaic_ray.spaces import Choice, Range, SweepPlan\n\ndef plan():\n    return SweepPlan('mine', {})\n"


def space(knobs: str, more: str = "") -> str:
    """The text of a space file."""
    return PLAN.replace("{}", "{" + knobs + "}" + more)


WRONG_SPACES = [
    ("def plan(:\n", ["mine.py, line 1", "SyntaxError"]),
    ("import json\nimport no_such_lab\n", ["mine.py, line 2", "no_such_lab"]),
    (PLAN + "\n1 / 0\n", ["mine.py, line 6", "ZeroDivisionError"]),
    ("def plan():\n    return {}['x']\n", ["mine.py, line 2", "KeyError"]),
    ("raise SystemExit(0)\n", ["mine.py, line 1", "SystemExit"]),
    ("def paln():\n    pass\n", ['"paln"']),
    ("def plan():\n    print('hello')\n", ["NoneType, not a SweepPlan"]),
    (space(""), ["nothing to try"]),
    (space("'meta.poll': Choice(('sum',))"), ['"meta.poll"', '"meta.pool"']),
    (space("'partition.omega': Choice((0.1, 0))"), ["partition.omega = 0", "above 0"]),
    (space("'warmup.lr': Choice(('fast',))"), ["warmup.lr = fast", "a number"]),
    (space("'generator.lambda_e': Range(2.0, 0.5)"), ["generator.lambda_e", "low < high"]),
    (space("'seed': Choice((0, 1))"), ["seed", "--seeds"]),
    (space("'warmup.lr': Choice((0.1,))", ", base={'meta.poll': 'sum'}"), ["--space mine: ", '"meta.poll"']),
    (space("'warmup.lr': Choice((0.1,))", ", preset='dmeo'"), ["dmeo", '"demo"']),
    (space("'warmup.lr': Range(0.1, 0.2)"), ["--search grid", "warmup.lr", "--search random"]),
    (
        space("'meta.input': Choice(('head', 'full')), 'meta.init': Choice(('random', 'prototype_head'))"),
        ["point 3 of the sweep (meta.input=full, meta.init=prototype_head)", "meta.input = head"],
    ),
    (
        space(
            "'warmup.lr': Range(0.1, 0.2), 'meta.input': Choice(('full', 'head')), "
            "'meta.init': Choice(('random', 'prototype_head'))",
            ", search='optuna'",
        ),
        ["meta.input=full, meta.init=prototype_head", "meta.input = head"],
    ),
    (
        space("'partition.omega': Range(0.1, 1.0), 'warmup.lr': Range(0.1, 0.2)", ", search='optuna'"),
        ["--search optuna: partition.omega", "Choice"],
    ),
    (
        space("'distill.workers': Range(0, 4), 'warmup.lr': Range(0.1, 0.2)", ", search='optuna'"),
        ["distill.workers = 4", "at most 1"],
    ),
    (
        space("", ", points=({}, {'federation.cohort_size': 15})"),
        ["point 1 of the sweep (federation.cohort_size=15)", "there are 5 clients"],
    ),
]


@pytest.mark.parametrize("text, told", WRONG_SPACES)
def test_a_wrong_space_is_answered_in_one_line_before_anything_starts(text, told):
    Path("mine.py").write_text(text)
    result = sweep("--space", "mine.py")
    if "hello" in text:  # what a space prints goes to standard error
        result.stderr_bytes = result.stderr_bytes.removeprefix(b"hello\n")
    line = refusal(result)
    for part in told:
        assert part in line
    assert files() == {"mine.py": text.encode()}


def test_a_process_refuses_and_lists_without_ray():
    """And the default sweep of another data set can be looked at without its files, in the same process."""
    asked = [
        ["spaces"],
        ["sweep", "--samples", "0"],
        ["sweep", "--space", "nowhere"],
        ["sweep", "--set", "runtime.cpus_per_client=6400"],
        ["sweep", "--dataset", "cifar100", "--clients", "100", "--dry-run", "--set", "data.root=empty"],
    ]
    code = """
import json, sys
from click.testing import CliRunner
from mosaic_ray.cli import mosaic
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(mosaic, words)
    loaded = sorted({"ray", "torch", "optuna", "torchvision", "pandas"} & set(sys.modules))
    print(json.dumps([result.exit_code, result.stdout, result.stderr, loaded]))
"""
    Path("empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True, check=True,
        env={"PATH": "", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    spaces, samples, nowhere, never, dry = (json.loads(line) for line in done.stdout.splitlines())
    assert [(answer[0], answer[3]) for answer in (spaces, samples, nowhere)] == [(0, []), (2, []), (2, [])]
    for name in list_spaces():
        assert re.search(rf"^ +{name} ", spaces[1], re.MULTILINE)
    assert samples[2].startswith("mosaic: error: --samples 0:")
    assert (never[0], never[1], never[2].count("\n")) == (2, "", 1)
    assert "runtime.cpus_per_client = 6400" in never[2]
    assert (dry[0], dry[2]) == (0, "")
    assert "16 trials" in dry[1]
    assert table(dry[1])["warmup"] == (16, 3)
    assert not {"ray", "optuna", "torchvision", "pandas"} & set(dry[3])
    assert not list(Path("empty").iterdir())
    assert not files()


# --- what would run --------------------------------------------------------------------------------------------------


def table(text: str) -> dict[str, tuple[int, int]]:
    """Stage to results asked for and computed, as a dry run prints them."""
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) +\S", text, re.MULTILINE)
    return {stage: (int(asked.replace(",", "")), int(unique.replace(",", ""))) for stage, asked, unique in rows}


def test_a_dry_run_needs_neither_data_nor_ray():
    result = sweep("--dataset", "cifar100", "--clients", "100", "--dry-run", "--set", "data.root=empty")
    assert (result.exit_code, result.stderr) == (0, "")
    counts = table(result.stdout)
    for stage in ("partition", "warmup", "prototypes", "teacher", "control"):
        assert counts[stage] == (16, 3), stage
    assert counts["generators"] == (1600, 1600)
    assert counts["distill"] == counts["finetune"] == (16, 16)
    head, *lines = result.stdout.splitlines()
    assert "space lambdas_omega, random search, 16 trials (16 points x 1 seeds)" in head
    assert lines[0].startswith("trials at once: ") and "limited by" in lines[0]
    assert lines[1].startswith("client hosts: 2") and lines[2].endswith("50 of a trial's 100, in turn")
    assert not files()


@pytest.mark.parametrize(
    "words, counts",
    [
        ("--space lambdas_grid", {"warmup": (27, 1), "prototypes": (27, 1), "teacher": (27, 1), "distill": (27, 27)}),
        ("--space lambdas_grid --seeds 0,1,2", {"warmup": (81, 3), "teacher": (81, 3), "distill": (81, 81)}),
        ("--search grid", {"warmup": (81, 3), "distill": (81, 81)}),
        ("--space smoke", {"partition": (6, 2), "warmup": (6, 2), "teacher": (6, 2), "distill": (6, 6)}),
        ("--space omega_ladder", {"warmup": (15, 15)}),
        ("--space omega_ladder --seed 7", {"warmup": (5, 5)}),
        ("--space omega_ladder --set seed=7", {"warmup": (5, 5)}),
        ("--samples 3 --seeds 4", {"distill": (3, 3)}),
        ("--space meta_training", {"generators": (45, 15), "teacher": (9, 9)}),
    ],
)
def test_a_dry_run_counts_what_is_computed_once(words, counts):
    result = sweep("--dry-run", *words.split())
    assert (result.exit_code, result.stderr) == (0, "")
    found = table(result.stdout)
    assert {stage: found[stage] for stage in counts} == counts


def test_a_dry_run_of_optuna_says_what_it_cannot_know():
    result = sweep("--dry-run", "--search", "optuna", "--samples", "5", "--seeds", "1,2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "optuna search, 10 trials (5 points x 2 seeds)" in result.stdout
    assert "trials at once: 2" in result.stdout
    assert table(result.stdout) == {}


def test_max_concurrent_bounds_the_plan():
    assert "trials at once: 1" in sweep("--dry-run", "--max-concurrent", "1").stdout
    assert "limited by --max-concurrent" in sweep("--dry-run", "--max-concurrent", "1").stdout


# --- which word wins -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> Callable[..., Request]:
    """The request that words make."""
    requests: list[Request] = []
    monkeypatch.setattr(sweep_launch, "dry_run", lambda request, *place: requests.append(request) or [])

    def request_of(*words: str) -> Request:
        result = sweep("--dry-run", *words)
        assert result.exit_code == 0, result.stderr
        return requests.pop()

    return request_of


MINE = space(
    "'warmup.lr': Choice((0.1, 0.2))",
    ", preset='fmnist_small', base={'generator.steps': 7, 'partition.omega': 0.5}, seeds=(5, 6)",
)


def test_preset_space_file_and_words_in_their_order(asked):
    Path("mine.py").write_text(MINE)
    Path("mine.toml").write_text("[generator]\nsteps = 8\n")
    Path("preset.toml").write_text("preset = 'cifar10_small'\n")
    one = ["--space", "mine.py"]
    given = {"generator.steps": 7, "partition.omega": 0.5, "partition.validation_fraction": 0.1}
    assert asked(*one).config == resolve("fmnist_small", file=given)
    assert asked(*one, "--preset", "cifar10_small").config == resolve("cifar10_small", file=given)
    assert asked(*one, "--config", "preset.toml").config == resolve("cifar10_small", file=given)
    both = ["--config", "preset.toml", "--preset", "demo"]
    assert asked(*one, *both).config == resolve("demo", file=given)
    assert asked(*one, "--config", "mine.toml").config.generator.steps == 8
    assert asked(*one, "--config", "mine.toml", "--set", "generator.steps=9").config.generator.steps == 9
    assert asked(*one, "--omega", "3").config.partition.omega == 3.0
    assert asked(*one, "--preset", "reference").config.algorithm == "reference"


def test_validation_images_are_held_out_unless_somebody_says_otherwise(asked):
    Path("all.toml").write_text("[partition]\nvalidation_fraction = 0.0\n")
    assert asked().config.partition.validation_fraction == 0.1
    assert asked("--set", "partition.validation_fraction=0").config.partition.validation_fraction == 0.0
    assert asked("--set", "partition.validation_fraction=0.3").config.partition.validation_fraction == 0.3
    assert asked("--config", "all.toml").config.partition.validation_fraction == 0.0
    assert door.config_of().partition.validation_fraction == 0.0, "a run on its own trains on everything"


@pytest.mark.parametrize(
    "words, seeds",
    [
        ("", (5, 6)),
        ("--seeds 3", (3,)),
        ("--seeds 2,0,1", (2, 0, 1)),
        ("--seeds ' 4, 007'", (4, 7)),
        ("--seed 9", (9,)),
        ("--set seed=9", (9,)),
        ("--set seed=8 --set seed=9", (9,)),
    ],
)
def test_a_typed_seed_goes_before_the_spaces_own(asked, words, seeds):
    Path("mine.py").write_text(MINE)
    sweep = prepare(asked("--space", "mine.py", *shlex.split(words)))
    assert [trial.seed for trial in sweep.trials] == [*seeds, *seeds]
    assert sweep.facts["seeds"] == list(seeds)


def test_words_reach_the_request(asked):
    request = asked("--search", "optuna", "--samples", "007", "--scheduler", "asha", "--max-concurrent", "3")
    assert (request.search, request.samples, request.scheduler, request.max_concurrent) == ("optuna", 7, "asha", 3)
    request = asked()
    assert (request.space, request.search, request.samples, request.scheduler) == ("lambdas_omega", "", None, "fifo")


# --- a request made definite -----------------------------------------------------------------------------------------


def request(plan: SweepPlan, **more: object) -> Request:
    return Request(VALID, "mine", plan, **more)


GRID = SweepPlan(
    "a test", {"partition.omega": Choice((0.1, 1)), "generator.lambda_d": Range(2, 10, grid=(2, 5))}, samples=3
)


def test_prepare_says_what_the_plan_is():
    sweep = prepare(request(GRID, seeds=(1, 0)))
    assert sweep.facts == {
        "space": "mine", "search": "grid", "samples": None, "seeds": [1, 0], "scheduler": "fifo",
        "knobs": {"partition.omega": "0.1, 1", "generator.lambda_d": "2 .. 10"},
        "points": [trial.knobs for trial in sweep.trials if trial.seed == 1],
        "base": as_dict(VALID),
    }  # fmt: skip
    assert (sweep.swept, sweep.conditions) == (("partition.omega", "generator.lambda_d"), ("partition.omega",))
    assert sweep.search.total == len(sweep.trials) == len(sweep.configs) == 8
    assert [sweep.search.next() for _ in range(8)] == list(sweep.trials)
    assert json.loads(json.dumps(sweep.facts)) == sweep.facts


@pytest.mark.parametrize(
    "search, samples, count", [("", None, 4), ("random", None, 3), ("random", 5, 5), ("optuna", 5, 5)]
)
def test_how_many_points(search, samples, count):
    sweep = prepare(request(GRID, search=search, samples=samples, seeds=(0, 1)))
    assert sweep.search.total == 2 * count
    assert sweep.facts["samples"] == (None if not search else count)
    if search == "optuna":
        assert sweep.facts["points"] is None
    else:
        assert len(sweep.facts["points"]) == count


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_what_this_machine_settles_is_no_part_of_the_plan(search):
    settled = override(VALID, {"runtime.precision": "fp32"})
    asked, made = prepare(request(GRID, search=search)), prepare(request(GRID, search=search), settled)
    assert asked.facts == made.facts
    assert {config.runtime.precision for config in made.configs} == {"fp32"}
    assert made.search.next().config.runtime.precision == "fp32"


def test_explicit_points_keep_the_base_itself():
    sweep = prepare(request(SweepPlan("a test", points=({}, {"meta.pool": "sum"}))))
    assert [trial.knobs for trial in sweep.trials] == [{}, {"meta.pool": "sum"}]
    assert (sweep.swept, sweep.conditions) == (("meta.pool",), ())


WIDE = SweepPlan(
    "a test",
    {
        "generator.lambda_e": Range(0.5, 2.0),
        "data.name": Choice(("digits", "mnist")),
        "meta.pool": Choice(("mean", "sum")),
        "data.root": Choice(("a", "b", "c")),
        "partition.omega": Choice((0.1, 1.0)),
        "data.download": Choice((False, True)),
    },
    search="optuna",
)


def test_before_optuna_begins_every_pair_of_values_is_looked_at():
    sweep = prepare(request(WIDE, samples=30))
    points = [trial.knobs for trial in sweep.trials]
    ends = {name: getattr(domain, "values", (0.5, 2.0)) for name, domain in WIDE.knobs.items()}
    for one, other in combinations(ends, 2):
        assert {(p[one], p[other]) for p in points} == set(product(ends[one], ends[other])), (one, other)
    assert len(points) == len({repr(point) for point in points})
    assert sweep.swept == tuple(WIDE.knobs)


def test_optunas_points_need_no_data_that_were_not_looked_at():
    sweep = prepare(request(WIDE, samples=30))
    known = {config.data for config in sweep.configs}
    for number in range(30):
        trial = sweep.search.next()
        assert trial.config.data in known
        sweep.search.ended(trial, float(number % 7))
    with pytest.raises(StopIteration):
        sweep.search.next()


def test_a_lone_knob_is_looked_at_from_end_to_end():
    plan = SweepPlan("a test", {"warmup.lr": Range(0.1, 0.2)}, search="optuna")
    assert [trial.knobs for trial in prepare(request(plan)).trials] == [{"warmup.lr": 0.1}, {"warmup.lr": 0.2}]


@pytest.mark.parametrize(
    "scheduler, search, ok", [("fifo", "grid", True), ("asha", "grid", False), ("fifo", "optuna", False)]
)
def test_who_learns_needs_validation_images(scheduler, search, ok):
    blind = replace(request(GRID, scheduler=scheduler, search=search), config=ExperimentConfig())
    if ok:
        prepare(blind)
    else:
        with pytest.raises(RequestError, match=r"partition\.validation_fraction above 0"):
            prepare(blind)


def test_one_trial_without_validation_images_is_enough_to_refuse():
    plan = SweepPlan("a test", points=({}, {"partition.validation_fraction": 0.0}))
    with pytest.raises(RequestError, match="--scheduler asha"):
        prepare(request(plan, scheduler="asha"))


@pytest.mark.parametrize(
    "storage, bound", [("./runs", True), ("/a", True), ("file:///a", True), ("s3://b/c", False), ("gs://b", False)]
)
def test_trials_stay_on_this_node_where_the_storage_is_here(storage, bound):
    nodes = [Node("a", 4, 0, 8 * 2**30), Node("b", 4, 0, 8 * 2**30)]
    assert (resources_of(prepare(request(GRID)), nodes, storage).trials_on == 0) is bound


# --- files that are there --------------------------------------------------------------------------------------------


@pytest.fixture
def trials(monkeypatch) -> list[str]:
    """Stands in for Ray: trials end as they are handed out, and their names are kept.

    A trial named in ``failing`` fails; at one named in ``interrupts`` somebody presses Ctrl-C.
    """
    ran = Trials()

    def run(feed, datasets, storage, address):
        while True:
            try:
                trial = feed.next()
            except StopIteration:
                return
            if trial.name in ran.interrupts:
                raise KeyboardInterrupt
            feed.began(trial)
            ran.append(trial.name)
            if trial.name in ran.failing:
                feed.ledger.record(trial, status="failed", stage="warmup", round=3, client=1, error="loss is\nnan")
            else:
                selection = {"metric": "validation accuracy", "value": 0.5}
                feed.ledger.record(trial, status="done", selection=selection, session=feed.ledger.session)
            feed.ended(trial)

    monkeypatch.setattr(sweep_launch, "_run", run)
    return ran


class Trials(list):
    failing: tuple[str, ...] = ()
    interrupts: tuple[str, ...] = ()


NAMES = [f"p00{point}s0" for point in range(6)]
PLACE = Path("mosaic_runs/sweeps/n")


def test_a_sweep_ends_with_its_results_and_is_found_again(trials):
    result = sweep(*SMOKE)
    assert result.exit_code == 0, result.stderr
    assert trials == NAMES
    assert "configurations 6, trials 6: 6 done" in result.stdout
    assert str(PLACE) in result.stdout
    assert read_results(PLACE / "results.parquet").column("trial").to_pylist() == NAMES
    before = files()
    again = sweep(*SMOKE)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert trials == NAMES
    assert {name: data for name, data in files().items() if "results" not in name} == {
        name: data for name, data in before.items() if "results" not in name
    }
    assert read_results(PLACE / "results.parquet").column("trial").to_pylist() == NAMES


def test_json_alone_on_standard_output(trials):
    facts = json.loads(sweep(*SMOKE, "--json").stdout)
    assert (facts["status"], facts["name"]) == ("done", "n")
    assert Path(facts["paths"]["sweep"]) == PLACE.absolute()
    assert [trial["trial"] for trial in facts["trials"]] == NAMES
    assert facts["trials"][0]["knobs"] == {"partition.omega": 0.1, "generator.lambda_d": 2.0}


def test_the_name_is_the_one_that_a_dry_run_says(trials):
    told = re.match(r"sweep (\S+): ", sweep("--space", "smoke", "--dry-run").stdout)[1]
    assert sweep("--space", "smoke").exit_code == 0
    assert [path.name for path in Path("mosaic_runs/sweeps").iterdir()] == [told]


def test_failed_trials_are_listed_and_tried_again(trials):
    trials.failing = ("p001s0", "p004s0")
    result = sweep(*SMOKE)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mosaic: error: 2 of 6 trials failed: p001s0 (loss is nan); p004s0 (loss is nan)")
    assert "trials 6: 4 done, 2 failed" in result.stdout
    rows = read_results(PLACE / "results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done", "failed", "done"]
    assert (rows[1]["error_stage"], rows[1]["error_round"], rows[1]["error_client"]) == ("warmup", 3, 1)
    trials.failing = ()
    trials.clear()
    assert sweep(*SMOKE).exit_code == 0
    assert trials == ["p001s0", "p004s0"]
    assert {row["status"] for row in read_results(PLACE / "results.parquet").to_pylist()} == {"done"}


def test_ctrl_c_names_the_command_that_resumes_the_same_session(trials, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mosaic"])
    trials.interrupts = ("p002s0",)
    result = sweep("--fresh", *SMOKE, "--set", "data.root=it's")
    assert (result.exit_code, result.stdout) == (130, "")
    command = result.stderr.splitlines()[-1].removeprefix("mosaic: interrupted; to resume: ")
    assert shlex.split(command) == ["/somewhere/bin/mosaic", "sweep", *SMOKE, "--set", "data.root=it's"]
    trials.interrupts = ()
    trials.clear()
    assert ask(*shlex.split(command)[1:]).exit_code == 0
    assert trials == NAMES[2:]
    summaries = [json.loads(path.read_bytes()) for path in PLACE.glob("trials/*/summary.json")]
    assert len({summary["session"] for summary in summaries}) == 1
    assert summaries[0]["session"] is not None


def test_a_fresh_sweep_runs_everything_and_keeps_the_old_one(trials):
    sweep(*SMOKE)
    before = {name.replace("sweeps/n/", "sweeps/n.1/"): data for name, data in files().items() if "sweeps/n/" in name}
    assert sweep(*SMOKE, "--fresh").exit_code == 0
    assert trials == NAMES * 2
    assert before.items() <= files().items()


@pytest.mark.parametrize(
    "words, told",
    [
        (["--set", "warmup.lr=0.5"], "(warmup.lr 0.05 there, 0.5 here)"),
        (["--seeds", "0,1"], "(seeds [0] there, [0, 1] here)"),
        (["--scheduler", "asha"], "(scheduler fifo there, asha here)"),
        (["--space", "lambdas_grid"], "(space smoke there, lambdas_grid here; "),
        (["--search", "random", "--samples", "6"], "(search grid there, random here; samples none there, 6 here; "),
    ],
)
def test_a_name_with_another_plan_is_refused_and_kept(trials, words, told):
    sweep(*SMOKE)
    before = files()
    line = refusal(sweep(*SMOKE, *words))
    assert line.startswith("mosaic: error: --name n: that sweep has another plan (") and told in line
    assert "another --name" in line and "--fresh" in line
    assert files() == before
    assert len(trials) == 6


def test_a_sweep_goes_on_with_the_precision_that_it_began_with(trials, monkeypatch):
    monkeypatch.setattr(precision, "probe", lambda **_: "bf16")
    trials.interrupts = ("p003s0",)
    sweep(*SMOKE)
    monkeypatch.setattr(precision, "probe", lambda **_: "fp32")
    trials.interrupts = ()
    assert sweep(*SMOKE).exit_code == 0
    assert trials == NAMES
    table = read_results(PLACE / "results.parquet")
    assert table.column("runtime.precision").to_pylist() == ["bf16"] * 6
    assert json.loads((PLACE / "plan.json").read_bytes())["base"]["runtime"]["precision"] == "auto"


def test_how_many_run_at_once_is_no_part_of_the_plan(trials):
    sweep(*SMOKE)
    assert sweep(*SMOKE, "--max-concurrent", "1").exit_code == 0
    assert len(trials) == 6


@pytest.mark.parametrize(
    "name, way",
    [
        ("plan.json", "half"),
        ("plan.json", "other"),
        ("results.parquet", "half"),
        ("results.parquet", "empty"),
        ("trials/p005s0/summary.json", "half"),
        ("trials/p005s0/summary.json", "empty"),
    ],
)
def test_a_damaged_file_is_said_in_one_line_and_mended_as_it_says(trials, name, way):
    trials.interrupts = ("p003s0",)  # so that a damaged trial lies behind one that is still to run
    sweep(*SMOKE)
    (PLACE / "trials/p005s0").mkdir()
    (PLACE / "trials/p005s0/summary.json").write_bytes((PLACE / "trials/p002s0/summary.json").read_bytes())
    trials.interrupts = ()
    trials.clear()
    path = PLACE / name
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "other": b"[1, 2]"}[way])
    before = files()
    line = refusal(sweep(*SMOKE))
    assert str(path) in line and "remove" in line and "--fresh" in line
    assert files() == before
    assert trials == []
    path.unlink()
    assert sweep(*SMOKE).exit_code == 0
    assert trials == NAMES[3:]


@pytest.mark.parametrize("name", ["plan.json", "results.parquet", "trials/p005s0/summary.json"])
def test_fresh_mends_what_is_damaged(trials, name):
    sweep(*SMOKE)
    (PLACE / name).write_bytes(b"{")
    assert sweep(*SMOKE, "--fresh").exit_code == 0
    assert trials == NAMES * 2
    assert (PLACE.with_name("n.1") / name).read_bytes() == b"{"


@pytest.mark.parametrize("way", ["s", "s/below", "s/objects", "s/sweeps", "s/sweeps/n", "s/sweeps/n/trials"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_in_the_way_of_the_storage_is_named_and_kept(trials, way, fresh):
    at = Path(way.removesuffix("/below"))
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text("mine")
    storage = way if way.endswith("below") else "s"
    words = [*SMOKE, "--storage", storage, *["--fresh"] * fresh]
    if fresh and way == "s/sweeps/n/trials":  # moved aside
        assert sweep(*words).exit_code == 0
        assert Path("s/sweeps/n.1/trials").read_text() == "mine"
        return
    line = refusal(sweep(*words))
    assert "s/sweeps/n" in line if fresh and way.startswith("s/sweeps/") else f"--storage {storage}: " in line
    assert at.read_text() == "mine"
    assert trials == []


@pytest.mark.parametrize("storage", ["/proc/nowhere", "nosuch://bucket/x"])
def test_a_storage_that_cannot_be_is_refused(trials, storage):
    assert f"--storage {storage}: " in refusal(sweep(*SMOKE, "--storage", storage))
    assert trials == []
    assert not files()


def test_missing_data_are_said_before_anything_runs(trials):
    line = refusal(sweep(*SMOKE, "--dataset", "cifar100", "--set", "data.root=empty"))
    assert "empty" in line and "download" in line
    assert trials == []
    assert not PLACE.exists()


def test_a_sweep_that_runs_already_is_left_alone(trials):
    with Store("mosaic_runs").try_lease("sweep-n"):
        assert "running already" in refusal(sweep(*SMOKE))
    assert trials == []
    assert sweep(*SMOKE).exit_code == 0


def test_optuna_goes_through_the_same_files(trials):
    words = ["--space", "lambdas_omega", "--search", "optuna", "--samples", "8", "--name", "n"]
    trials.interrupts = ("p005s0",)
    assert sweep(*words).exit_code == 130
    trials.interrupts = ()
    assert sweep(*words).exit_code == 0
    assert trials == [f"p00{point}s0" for point in range(8)]
    rows = read_results(PLACE / "results.parquet").to_pylist()
    assert [row["partition.omega"] for row in rows] == [0.01, 0.1, 1.0, 0.01, 0.1, 1.0, 0.01, 0.1]
    plan = load_space("lambdas_omega")[1]
    straight = prepare(Request(door.config_of(base=sweep_launch.SWEEP_BASE), "x", plan, search="optuna", samples=8))
    for row in rows:
        trial = straight.search.next()
        assert {name: row[name] for name in trial.knobs} == trial.knobs
        assert flatten(trial.config)["generator.lambda_e"] == row["generator.lambda_e"]
        straight.search.ended(trial, 0.5)


# --- spaces ----------------------------------------------------------------------------------------------------------


def test_spaces_lists_every_space():
    result = ask("spaces")
    assert result.exit_code == 0
    for name in list_spaces():
        assert re.search(rf"^ +{name} ", result.stdout, re.MULTILINE), name
