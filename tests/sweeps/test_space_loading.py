"""Loading spaces by name, from a file and from a module, and the errors of those that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_runner import refused_by

from mosaic_ray.sweeps.space import Choice, load_space

REPO = Path(__file__).resolve().parents[2]


GOOD = """from mosaic_ray.sweeps.space import Choice, SweepPlan

def plan():
    return SweepPlan('mine', {'meta.pool': Choice(('sum',))})
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory that Python does not import from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    return tmp_path


@pytest.mark.parametrize(
    "word, says",
    [
        ("smokey", '--space smokey: unknown space; did you mean "smoke"?'),
        ("wxyz", "--space wxyz: unknown space; it may be ablation, client_count,"),
        ("", "--space : unknown space; "),
        ("../smoke", "--space ../smoke: unknown space; "),
        ("gone.py", "--space gone.py: No such file or directory"),
        ("folder.py", "--space folder.py: Is a directory"),
        (":plan", "--space :plan: it takes a name, module:function or FILE.py"),
        ("lab:", "--space lab:: it takes a name, module:function or FILE.py"),
        ("a b:plan", "--space a b:plan: it takes a name, module:function or FILE.py"),
        ("no_such_lab.x:plan", '--space no_such_lab.x:plan: no module "no_such_lab" on Python\'s path or in the'),
        ("json:plan", "--space json:plan: no function plan() there"),
    ],
)  # fmt: skip
def test_an_unknown_space_is_named(here, word, says):
    (here / "folder.py").mkdir()
    assert refused_by(load_space, word).startswith(says)


@pytest.mark.parametrize(
    "source, says",
    [
        ("import no_such_thing\n", "{file}, line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("print('hello')\n\nx = 1 / 0\n", "{file}, line 3: ZeroDivisionError: division by zero"),
        ("x = 1\ndef plan(:\n", "{file}, line 2: SyntaxError: invalid syntax"),
        ("x = '\xff\xfe'\n", "{file}, line 1: SyntaxError: (unicode error)"),
        ("x = 1\n", "no function plan() there"),
        ("def plam():\n    pass\n", 'no function plan() there; did you mean "plam"?'),
        ("plan = 3\n", "no function plan() there"),
        ("def plan():\n    x = 1\n    raise ValueError('two\\nlines')\n", "{file}, line 3: ValueError: two lines"),
        ("import json\ndef plan():\n    return json.loads('{')\n", "{file}, line 3: JSONDecodeError: Expecting prop"),
        ("def plan():\n    return deeper()\ndef deeper():\n    return {}['x']\n", "{file}, line 4: KeyError: 'x'"),
        ("raise SystemExit(3)\n", "{file}, line 1: SystemExit: 3"),
        ("def plan(x):\n    pass\n", "TypeError: plan() missing 1 required positional argument: 'x'"),
        ("from mosaic_ray.config.resolve import check_value as c\ndef plan():\n    c('lr', 1)\n",
         "{file}, line 3: RequestErr"),
        ("from mosaic_ray.spaces import SweepPlan\ndef plan():\n    SweepPlan(knob={})\n", "{file}, line 3: TypeError"),
        ("def plan():\n    return {}\n", "plan() returned dict, not a SweepPlan"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["file", "module"])
def test_an_error_in_a_space_names_its_file_and_line(here, source, says, form, request, capsys):
    module = f"bad_{request.node.callspec.indices['source']}"  # another name each time: imports are remembered
    (here / f"{module}.py").write_bytes(source.encode("latin-1"))
    word, file = (f"{module}.py", f"{module}.py") if form == "file" else (f"{module}:plan", str(here / f"{module}.py"))
    assert refused_by(load_space, word).startswith(f"--space {word}: {says.replace('{file}', file)}")
    assert capsys.readouterr().out == ""  # standard output is for results


def test_an_error_in_an_imported_file_names_the_importing_line(here):
    (here / "outer_space.py").write_text("x = 1\nimport inner_space\n")
    (here / "inner_space.py").write_text("\n\n\nx = = 1\n")
    says = f"--space outer_space:plan: {here / 'outer_space.py'}, line 2: SyntaxError: invalid syntax (inner_space.py, "
    assert refused_by(load_space, "outer_space:plan").startswith(says)


def test_a_space_from_a_file(here, capsys):
    (here / "mine.v2.py").write_text("print('hello')\n" + GOOD)
    name, plan = load_space("./mine.v2.py")
    assert name == "mine.v2" and plan.knobs == {"meta.pool": Choice(("sum",))}
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")
    assert [path.name for path in here.iterdir()] == ["mine.v2.py"]  # no cache beside it
    (here / "mine.v2.py").write_text(GOOD.replace("mine", "mind"))  # same size, same second
    assert load_space("./mine.v2.py")[1].summary == "mind"
    assert load_space(str(here / "mine.v2.py"))[0] == "mine.v2"


def test_a_space_file_has_dataclasses_and_its_path(here):
    head = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
    (here / "typed.py").write_text(head + GOOD.replace("'mine'", "__file__"))
    assert load_space("typed.py")[1].summary == str(here / "typed.py")


def test_a_space_from_a_function_of_a_module(here):
    before = list(sys.path)
    (here / "test_lab").mkdir()
    (here / "test_lab" / "__init__.py").write_text("")
    (here / "test_lab" / "wide.py").write_text(GOOD + GOOD.replace("plan", "narrow").replace("mine", "lazy"))
    assert [load_space(f"test_lab.wide:{f}")[0] for f in ("plan", "narrow")] == ["wide", "narrow"]
    assert load_space("test_lab.wide:narrow")[1].summary == "lazy"
    assert refused_by(load_space, "test_lab.wide:narow") == (
        '--space test_lab.wide:narow: no function narow() there; did you mean "narrow"?'
    )
    assert refused_by(load_space, "test_lab.wider:plan").startswith(
        '--space test_lab.wider:plan: no module "test_lab.wider"'
    )
    assert sys.path == before
