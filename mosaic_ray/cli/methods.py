"""Methods and strategies by name, with what they declare about themselves (``core.about``)."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..config import plugins
from ..config.fields import knobs_of, shown
from ..config.user_code import load_object
from ..core.about import About, Paper
from ..core.errors import RequestError, neighbours

#: Headings by kind.
TITLES = {"methods": "Methods", "strategies": "Federated strategies (join several by a plus)"}


class Found(NamedTuple):
    """A method or a strategy: its kind, its name or place, one line, and the object; None where it does not load."""

    kind: str
    word: str
    summary: str
    object: Any


def every() -> list[Found]:
    """Return all that have a name."""
    return [_loaded(kind, word, strict=False) for kind in TITLES for word in plugins.entries(kind)]


def find(name: str) -> list[Found]:
    """Return the methods and strategies that ``name`` means: one, two of this name, or several joined by a plus."""
    found = []
    known = {kind: plugins.entries(kind) for kind in TITLES}
    for word in plugins.parts(name):
        kinds = [kind for kind in TITLES if word in known[kind]]
        if ":" in word:
            kinds = [getattr(load_object(f"methods {name}", word), "kind", "strategies")]
        if not kinds:
            names = {word for words in known.values() for word in words}
            raise RequestError(f"methods {name}: unknown method or strategy; {neighbours(word, names)}")
        found += [_loaded(kind, word) for kind in kinds]
    return found


def _loaded(kind: str, word: str, strict: bool = True) -> Found:
    entry = plugins.entries(kind).get(word)
    try:
        found = plugins.load(kind, word)
    except RequestError:
        if strict:
            raise
        found = None
    return Found(kind, word, entry.summary if entry else word, found)


def about_of(found: Found) -> About | None:
    """Return what it declares about itself."""
    about = getattr(found.object, "about", None)
    return about if isinstance(about, About) else None


def papers_of(found: Found) -> tuple[Paper, ...]:
    """Return the papers that it declares."""
    about = about_of(found)
    return about.papers if about else ()


def needs(found: Found) -> str:
    """Return in one line what it needs of its clients."""
    if found.object is None:
        return "It does not load: `mosaic methods NAME` says why."
    about = about_of(found)
    return about.summary() if about else "It declares no needs."


def bibtex_of(found: list[Found]) -> str:
    """Return the papers of ``found`` as BibTeX, each once; ``RequestError`` where there is none."""
    entries = dict.fromkeys(paper.bibtex() for one in found for paper in papers_of(one))
    if not entries:
        words = ", ".join(dict.fromkeys(one.word for one in found))
        raise RequestError(f"methods {words} --bibtex: it declares no paper; `mosaic methods` has those that do")
    return "\n\n".join(entries)


def described(found: Found) -> tuple[str, dict[str, str]]:
    """Return a title and rows: what it needs, its knobs, its papers."""
    about, own = about_of(found), found.object.knobs
    rows = {"summary": found.summary} | (about.rows() if about else {"needs": "not declared"})
    if found.kind == "strategies":
        rows["narrow clients"] = "yes" if found.object.partial_widths else "no, or beside a strategy that takes them"
        rows["narrow clients"] = "no" if found.object.whole_models else rows["narrow clients"]
    for knob in knobs_of(own, f"{found.object.name}.") if own else ():
        rows[knob.name] = f"{knob.metadata['help']}  [default: {shown(knob.default)}]"
    rows |= {f"paper {paper.key}": paper.citation() for paper in papers_of(found)}
    return f"{'Method' if found.kind == 'methods' else 'Strategy'} {found.word}", rows
