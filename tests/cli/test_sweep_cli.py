"""`mosaic sweep` and `mosaic spaces`: wrong requests are refused in one line before Ray starts, valid ones pass."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from cli_runner import ask, refusal
from click.testing import Result

from mosaic_ray.cli.request import parse_config
from mosaic_ray.config.resolve import resolve
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps.runner import SweepRequest, prepare
from mosaic_ray.sweeps.space import list_spaces
from mosaic_ray.sweeps.state import plan_name

pytestmark = pytest.mark.usefixtures("two_cpus")

REPO = Path(__file__).resolve().parents[2]


SMOKE = ["--space", "smoke", "--name", "n"]


def sweep(*words: str) -> Result:
    return ask("sweep", *words)


def files(folder: Path = Path()) -> dict[str, bytes]:
    """Return all files below the working directory."""
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
    ("--space smoke --omega 2", ["--grid partition.omega=A,B,... in place of --space", "another --space"]),
    ("--omega 2", ["--omega 2:", "lambdas_omega", "--grid partition.omega="]),
    ("--grid partition.omega=1 --space smoke", ["--grid partition.omega=1:", "--space smoke", "one of them"]),
    ("--space lambdas_omega --grid warmup.lr=1", ["--space lambdas_omega", "one of them"]),
    ("--grid partition.omega=1,2 --omega 3", ["--omega 3:", "--grid", "partition.omega", "one of them"]),
    ("--grid federation.strategy=fedavg --set federation.optimiser=fedrolex", ["--set federation.optimiser", "--grid"]),
    ("--grid partition.omga=1", ["--grid partition.omga=1:", '"partition.omega"']),
    ("--grid partition.omega=0.1,-1", ["--grid partition.omega=0.1,-1:", "above 0"]),
    ("--grid warmup.num_rounds=1,2.5", ["--grid warmup.num_rounds=1,2.5:", "whole number"]),
    ("--grid partition.omega=1,1.0", ["--grid partition.omega=1,1.0:", "1 is there twice"]),
    ("--grid meta.pool=sum --grid meta.pool=mean", ["--grid meta.pool=mean:", "all in one"]),
    ("--grid federation.strategy=fedavg --grid federation.optimiser=fedrolex", ["federation.optimiser=", "all in one"]),
    ("--grid partition.omega=", ["--grid partition.omega=:", "KNOB=A,B,..."]),
    ("--grid partition.omega", ["--grid partition.omega:", "KNOB=A,B,..."]),
    ("--grid partition.omega=1,,2", ["--grid partition.omega=1,,2:", "KNOB=A,B,..."]),
    ("--grid partition.omega=1,", ["--grid partition.omega=1,:", "KNOB=A,B,..."]),
    ("--grid =1", ["--grid =1:", "KNOB=A,B,..."]),
    ("--grid ''", ["--grid :", "KNOB=A,B,..."]),
    ("--grid federation.widths=[1.0,0.5", ["--grid federation.widths=[1.0,0.5:", "a list of numbers"]),
    ("--grid seed=0,1", ["--grid seed=0,1:", "--seeds"]),
    ("--grid algorithm=paper,fixed", ["--grid algorithm=paper,fixed:", "--algorithm"]),
    ("--grid federation.cohort_size=5,15", ["point 1", "federation.cohort_size = 15", "5 clients"]),
    ("--grid meta.pool=sum,mean --samples 2", ["--samples 2:", "--search random"]),
    ("--set runtime.gpus_per_client=0.5", ["runtime.gpus_per_client = 0.5", "0 runs clients on CPUs"]),
]  # fmt: skip


@pytest.mark.parametrize("words, parts", WRONG, ids=[words[:60] for words, _ in WRONG])
def test_a_wrong_option_is_refused_and_nothing_is_written(words, parts):
    line = refusal(sweep(*shlex.split(words)))
    for part in parts:
        assert part in line
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "words",
    ["--samples 0", "--name a/b", "--set runtime.cpus_per_client=64", "--space smoke --samples 4", "--space nowhere"],
)
def test_a_dry_run_refuses_what_a_sweep_would(words):
    assert refusal(sweep("--dry-run", *words.split())) == refusal(sweep(*words.split()))


PLAN = "from mosaic_ray.sweeps.space import Choice, Range, SweepPlan\n\ndef plan():\n    return SweepPlan('mine', {})\n"


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
    (space("'warmup.lr': Choice(('fast',))"), ['warmup.lr = "fast"', "a number"]),
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


@pytest.mark.parametrize("text, parts", WRONG_SPACES)
def test_a_wrong_space_is_refused_in_one_line(text, parts):
    Path("mine.py").write_text(text)
    result = sweep("--space", "mine.py")
    if "hello" in text:  # what a space prints goes to standard error
        result.stderr_bytes = result.stderr_bytes.removeprefix(b"hello\n")
    line = refusal(result)
    for part in parts:
        assert part in line
    assert files() == {"mine.py": text.encode()}


def test_a_process_refuses_and_lists_without_ray():
    """The same process can also show the default sweep of a data set without its files."""
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
    """Map each stage to the results requested and computed, as a dry run prints them."""
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
    assert "schedule cifar100_small (no GPU in reach); --preset cifar100 for the full scale" in lines
    assert "9,000 client rounds, 45,000 local steps" in result.stdout, "30 rounds of 5 steps, 100 clients, 3 omegas"
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


def test_a_dry_run_gives_its_plan_as_json():
    result = sweep("--dry-run", "--json", "--space", "smoke", "--name", "n")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["name"], found["space"], found["points"], found["seeds"]) == ("n", "smoke", 6, 1)
    assert {"stage": "warmup", "asked": 6, "unique": 2}.items() <= found["work"][1].items()
    assert found["resources"][0].startswith("trials at once: ")
    assert json.loads(sweep("--dry-run", "--json", "--search", "optuna", "--samples", "5").stdout)["work"] is None
    assert not files()


def test_a_dry_run_of_optuna_has_no_work_table():
    result = sweep("--dry-run", "--search", "optuna", "--samples", "5", "--seeds", "1,2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "optuna search, 10 trials (5 points x 2 seeds)" in result.stdout
    assert "trials at once: 2" in result.stdout
    assert table(result.stdout) == {}


def test_a_dry_run_names_optunas_version():
    said = sweep("--dry-run", "--grid", "meta.pool=mean,sum", "--search", "optuna", "--samples", "3").stdout
    assert f"by the TPE of optuna {optuna.__version__}\n" in said


def test_a_dry_run_of_a_grid():
    words = (
        "--dry-run", "--algorithm", "distilled", "--grid", "partition.omega=0.1,1", "--grid",
        "distill.temperature=1,2,3",
    )  # fmt: skip
    result = sweep(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "sweep grid-digits-" in result.stdout and "space --grid, grid search, 6 trials (6 points" in result.stdout
    assert table(result.stdout)["warmup"] == (6, 2) and table(result.stdout)["distill"] == (6, 6)
    drawn = sweep(*words, "--search", "random", "--samples", "20").stdout
    assert "6 trials" in drawn and "--samples 20: the space has only 6 points" in drawn


def test_max_concurrent_bounds_the_plan():
    assert "trials at once: 1" in sweep("--dry-run", "--max-concurrent", "1").stdout
    assert "limited by --max-concurrent" in sweep("--dry-run", "--max-concurrent", "1").stdout


# --- which word wins -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> Callable[..., SweepRequest]:
    """Return the request that the command line makes."""
    requests: list[SweepRequest] = []
    nothing = sweep_runner.DryRun("n", "mine", "grid", points=1, seeds=1, resources=[], work=None)
    monkeypatch.setattr(sweep_runner, "dry_run", lambda request, *place: requests.append(request) or nothing)

    def request_of(*words: str) -> SweepRequest:
        result = sweep("--dry-run", *words)
        assert result.exit_code == 0, result.stderr
        return requests.pop()

    return request_of


MINE = space(
    "'warmup.lr': Choice((0.1, 0.2))",
    ", preset='fmnist_small', base={'generator.steps': 7, 'partition.omega': 0.5}, seeds=(5, 6)",
)


def test_precedence_of_preset_space_file_and_options(asked):
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


def test_sweeps_hold_out_validation_images_by_default(asked):
    Path("all.toml").write_text("[partition]\nvalidation_fraction = 0.0\n")
    assert asked().config.partition.validation_fraction == 0.1
    assert asked("--set", "partition.validation_fraction=0").config.partition.validation_fraction == 0.0
    assert asked("--set", "partition.validation_fraction=0.3").config.partition.validation_fraction == 0.3
    assert asked("--config", "all.toml").config.partition.validation_fraction == 0.0
    assert parse_config().partition.validation_fraction == 0.0, "a run on its own trains on everything"


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
def test_a_typed_seed_replaces_the_seeds_of_the_space(asked, words, seeds):
    Path("mine.py").write_text(MINE)
    sweep = prepare(asked("--space", "mine.py", *shlex.split(words)))
    assert [trial.seed for trial in sweep.trials] == [*seeds, *seeds]
    assert sweep.plan_json["seeds"] == list(seeds)


def test_a_grid_is_the_product_of_its_knobs(asked):
    words = ["federation.widths=[1.0,0.5], [1.0],rho:3", 'data.root="a, b",it\'s', "data.skip_bad=true,false"]
    grid = [w for word in words for w in ("--grid", word)]
    request = asked("--preset", "fmnist_small", *grid, "--set", "warmup.lr=1")
    assert (request.space, request.config.data.name, request.config.warmup.lr) == ("--grid", "fmnist", 1.0)
    values = [domain.values for domain in request.plan.knobs.values()]
    assert values == [((1.0, 0.5), (1.0,), "rho:3"), ("a, b", "it's"), (True, False)]
    assert list(request.plan.knobs) == ["federation.widths", "data.root", "data.skip_bad"]


def test_a_grid_has_a_plug_in_and_its_knob(asked, tmp_path):
    lab = (REPO / "tests/plugins/lab/median.py").read_text()
    (tmp_path / "mine.py").write_text(lab.replace('"median"', '"mine"'))
    named = f"federation.strategy={tmp_path}/mine.py:MEDIAN"
    plan = prepare(asked("--grid", "mine.step=.5,1", "--grid", named)).plan_json
    assert [point["mine.step"] for point in plan["points"]] == [0.5, 1.0]


def test_the_same_grid_resumes_and_another_does_not(asked):
    def named(*words: str) -> str:
        return plan_name(prepare(asked(*words)).plan_json)

    name = named("--grid", "meta.pool=mean,sum")
    assert named("--grid", " meta.pool = mean, sum") == name != named("--grid", "meta.pool=sum")


def test_options_reach_the_request(asked):
    request = asked("--search", "optuna", "--samples", "007", "--scheduler", "asha", "--max-concurrent", "3")
    assert (request.search, request.samples, request.scheduler, request.max_concurrent) == ("optuna", 7, "asha", 3)
    request = asked()
    assert (request.space, request.search, request.samples, request.scheduler) == ("lambdas_omega", "", None, "fifo")


# --- spaces ----------------------------------------------------------------------------------------------------------


def test_spaces_lists_every_space():
    result = ask("spaces")
    assert result.exit_code == 0
    for name in list_spaces():
        assert re.search(rf"^ +{name} ", result.stdout, re.MULTILINE), name
