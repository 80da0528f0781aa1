"""docs/algorithm.md defines every letter and section that is cited, and agrees with the code on knobs and presets."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_ray.config.resolve import KNOBS, check_value, flatten, resolve

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "algorithm.md").read_text(encoding="utf-8")

#: Words of a letter's form that cite nothing: Amazon's storage, safetensors' names of types, norms.
NOT_LETTERS = {"S3", "F16", "F32", "F64", "I32", "I64", "U8", "L1", "L2"}


def sources() -> dict[str, str]:
    """The text of every file that may cite the page, by its path in the repository; this one excepted."""
    folders = ("mosaic_ray", "tune_spaces", "tests", "benchmarks", "examples", "docs")
    paths = [path for folder in folders for kind in ("*.py", "*.md") for path in (REPO / folder).rglob(kind)]
    paths.append(REPO / "README.md")
    return {str(path.relative_to(REPO)): path.read_text(encoding="utf-8") for path in paths if path != Path(__file__)}


def cited_letters(text: str) -> set[str]:
    """Letters such as G9 in ``text``, all of "O12 to O14" and those in names such as test_o15_..."""
    found = set(re.findall(r"(?<![\w.#/-])([A-Z]\d{1,2})(?![\w-]|\.\d)", text))
    for letter, first, last in re.findall(r"\b([A-Z])(\d{1,2}) to \1(\d{1,2})\b", text):
        found |= {f"{letter}{number}" for number in range(int(first), int(last) + 1)}
    for name in re.findall(r"\bdef (test_\w+)", text):
        found |= {letter.upper() for letter in re.findall(r"_([a-z]\d{1,2})(?=_)", name)}
    return found - NOT_LETTERS


def cited_sections(text: str) -> set[str]:
    """Sections such as 3.6 that ``text`` names right after algorithm.md, all of "3.5 to 3.7"."""
    text = re.sub(r"\n *#:? ", "\n", text)  # comments of several lines
    number = r"\d(?:\.\d{1,2})?"
    numbers = rf"{number}(?:(?:,| and| to) {number})*"
    found = set()
    for run in re.findall(rf"algorithm\.md[,\s]+(?:section )?({numbers})", text):
        found |= set(re.findall(number, run))
        for whole, first, last in re.findall(r"(\d)\.(\d+) to \1\.(\d+)", run):
            found |= {f"{whole}.{part}" for part in range(int(first), int(last) + 1)}
    return found


def cited_stages(text: str) -> set[str]:
    """Stages such as KD in "stage KD" or "Stages A, M and KD"."""
    letters = r"[A-Z]{1,2}\b"
    runs = re.findall(rf"\b[Ss]tages? ({letters}(?:(?:,| and|, and) {letters})*)", text)
    return {letter for run in runs for letter in re.findall(rf"\b{letters}", run)}


LETTERS = re.findall(r'^\| <b id="([A-Z]\d{1,2})">\1</b> \|', PAGE, re.MULTILINE)
SECTIONS = re.findall(r"^#+ (\d(?:\.\d{1,2})?)\.? ", PAGE, re.MULTILINE)
STAGES = re.findall(r"^\| ([A-Z]{1,2}) \| .* \| 1\.\d \|$", PAGE, re.MULTILINE)
CITATIONS = {
    "letters": (cited_letters, LETTERS),
    "sections": (cited_sections, SECTIONS),
    "stages": (cited_stages, STAGES),
}


def undefined(cited: Callable[[str], set[str]], defined: list[str], texts: dict[str, str]) -> dict[str, list[str]]:
    """Map each citation in ``texts`` that the page does not define to its files."""
    places = defaultdict(list)
    for path, text in texts.items():
        for citation in cited(text) - set(defined):
            places[citation].append(path)
    return dict(places)


@pytest.mark.parametrize("kind", CITATIONS)
def test_every_citation_is_defined_once(kind):
    cited, defined = CITATIONS[kind]
    assert undefined(cited, defined, sources()) == {}
    assert [citation for citation, times in Counter(defined).items() if times > 1] == []


def test_citations_are_found_in_the_forms_that_code_uses():
    text = '''
    """Laws (O12 to O14 but O13), G9: see docs/algorithm.md, K1; not S3, F32, 2.1A, v1.2, #F4, P100 or a-M5."""
    # Stages A, M and KD (docs/algorithm.md 3.5 to 3.7, O24), algorithm.md 1.2 and 4.1, docs/algorithm.md
    # section 8 and docs/algorithm.md section 0; ALGORITHMS = 9; the stage KD
    def test_o15_k4_shares(): ...
    '''
    assert cited_letters(text) == {"O12", "O13", "O14", "G9", "K1", "O24", "O15", "K4"}
    assert cited_sections(text) == {"3.5", "3.6", "3.7", "1.2", "4.1", "8", "0"}
    assert cited_stages(text) == {"A", "M", "KD"}


def test_a_citation_without_definition_is_found():
    texts = {"a.py": "(G9) and (G99)", "b.py": "def test_o98_x(): ...  # algorithm.md 9.7, stage ZZ"}
    found = {kind: undefined(cited, defined, texts) for kind, (cited, defined) in CITATIONS.items()}
    assert found == {
        "letters": {"G99": ["a.py"], "O98": ["b.py"]}, "sections": {"9.7": ["b.py"]}, "stages": {"ZZ": ["b.py"]},
    }  # fmt: skip


def test_the_code_cites_the_page():
    texts = sources()
    cited = set().union(*map(cited_letters, (text for path, text in texts.items() if not path.startswith("docs/"))))
    assert {"D11", "F2", "G9", "K1", "M6", "O15", "P3"} <= cited


# --- knobs -----------------------------------------------------------------------------------------------------------


def test_every_knob_on_the_page_exists_and_takes_the_value_named():
    groups = "|".join({name.partition(".")[0] for name in KNOBS if "." in name})
    named = re.findall(rf"`((?:{groups})\.\w+)(?: = ([^`]+))?`", PAGE)
    assert len(named) > 50
    assert {name for name, _ in named} - KNOBS.keys() == set()
    for name, value in named:
        if value:
            check_value(name, value, text=True)


def test_the_table_of_presets_is_the_codes():
    presets = {name: flatten(resolve(f"demo+{name}")) for name in ("fixed", "distilled", "paper", "reference")}
    row = r"^\| `([\w.]+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \| ([A-Z\d.]+) \|$"
    rows = re.findall(row, PAGE, re.MULTILINE)
    shown = {knob: tuple(check_value(knob, value, text=True) for value in values) for knob, *values, _ in rows}
    actual = {knob: tuple(knobs[knob] for knobs in presets.values()) for knob in KNOBS if knob != "algorithm"}
    assert shown == {knob: values for knob, values in actual.items() if len(set(values)) > 1}
    assert {letter for *_, letter in rows} <= {*LETTERS, *SECTIONS}
