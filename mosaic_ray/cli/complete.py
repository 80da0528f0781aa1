"""Completion in a shell: the values that options and arguments take, and the script that `mosaic completion` prints.

A shell asks at each press of the tab key, so nothing here may load numpy, pyarrow, torch or Ray.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    shell_complete,
    split_arg_string,
)

from ..config.presets import ALGORITHMS, GENERIC, SCALES, scale_named
from ..config.registry import CLASSIFIERS, DATASETS, METHODS, STATUSES, STRATEGIES, TRACKERS
from ..config.resolve import KNOBS
from ..core.errors import RequestError

Items = list[CompletionItem[str]]
Completer = Callable[..., Items]  # of the context, the incomplete word, and the parameter as ``param``

#: The variable by which a shell asks.
VARIABLE = "_MOSAIC_COMPLETE"
#: Most names of runs in an answer.
MOST_NAMES = 1000
#: Names that no shell reads as more than one word, and no terminal as a command.
_PLAIN = re.compile(r"[\w.+@%=,-]+")


class _Bash(BashComplete):
    """Complete in bash, which divides words at ``=`` and ``:`` and puts answers in place of the last part."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' type value
    for line in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_CWORD="$2" %(complete_var)s=bash_complete \\
        "$1" 2>/dev/null)
    do
        IFS=, read -r type value <<< "$line"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value"); [[ $value == *= ]] && compopt -o nospace ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
    _before = ""  # the part of the word that bash keeps

    def source(self) -> str:
        return ShellComplete.source(self)  # without starting bash

    def get_completion_args(self) -> tuple[list[str], str]:
        line, last = os.environ.get("COMP_LINE", ""), os.environ.get("COMP_CWORD", "")
        words = split_arg_string(line)[1:]
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        if not last.strip("=:"):
            self._before = incomplete
        elif incomplete.endswith(last):
            self._before = incomplete.removesuffix(last)
        return words, incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type},{item.value.removeprefix(self._before)}"


class _Zsh(ZshComplete):
    """Complete in zsh, without a space after ``KNOB=``."""

    source_template = (
        ZshComplete.source_template.replace(
            "    for type key", "    local -a end\n    [[ $response[2] == *= ]] && end=(-S '')\n    for type key"
        )
        .replace("completions_with_descriptions -U", "completions_with_descriptions -U \"${end[@]}\"")
        .replace("compadd -U", "compadd -U \"${end[@]}\"")
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": FishComplete}


def script(shell: str) -> str:
    """Return the script that makes ``shell`` ask this command; ``RequestError`` for a shell that is not known."""
    if shell not in SHELLS:
        raise RequestError(f"completion {shell}: it takes {', '.join(SHELLS)}")
    return SHELLS[shell](click.Command("mosaic"), {}, "mosaic", VARIABLE).source()


def answer(command: click.Command) -> int:
    """Print what may follow the words of a command line, and return the exit status; a shell asks by ``VARIABLE``."""
    for name, shell in SHELLS.items():
        add_completion_class(shell, name)
    _prepare(command)
    return shell_complete(command, {}, "mosaic", VARIABLE, os.environ[VARIABLE])


def _prepare(command: click.Command) -> None:
    """Let the parameters of ``command``, and of the commands below it, complete what ``COMPLETERS`` says."""
    for parameter in command.params:
        found = COMPLETERS.get(f"{command.name} {parameter.name}") or COMPLETERS.get(parameter.name or "")
        if found is not None:
            parameter.shell_complete = partial(found, param=parameter)  # type: ignore[method-assign]
    for below in getattr(command, "commands", {}).values():
        _prepare(below)


def _matching(values: Iterable[str], incomplete: str, before: str = "", after: str = "") -> Items:
    """Return the ``values`` that go on from ``incomplete``, each with its help where ``values`` maps to it."""
    told: Mapping[str, str] = values if isinstance(values, Mapping) else {}
    words = ((f"{before}{value}{after}", told.get(value)) for value in values)
    return [CompletionItem(word, help=help) for word, help in words if word.startswith(incomplete)]


def one_of(values: Iterable[str]) -> Completer:
    """Return a completer of fixed ``values``."""
    return lambda ctx, incomplete, param: _matching(values, incomplete)


def path(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Let the shell complete a file's name."""
    return [CompletionItem(incomplete, type="file")]


def folder(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Let the shell complete a folder's name."""
    return [CompletionItem(incomplete, type="dir")]


def presets(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete scales and algorithms; after a plus the other kind."""
    scales = {name: scale.summary for name, scale in SCALES.items()} | {n: scale_named(n).summary for n in GENERIC}
    algorithms = {name: summary for name, (_, summary) in ALGORITHMS.items()}
    first, plus, _ = incomplete.rpartition("+")
    if not plus:
        return _matching(scales | algorithms, incomplete)
    return _matching(scales if first in algorithms else algorithms, incomplete, f"{first}+")


def datasets(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete names of data sets, the user's imported ones too."""
    from ..config.schema import DataConfig
    from ..data.paths import data_root, imported_names

    known = {name: entry.summary for name, entry in DATASETS.items()}
    with contextlib.suppress(OSError):
        known |= dict.fromkeys(imported_names(data_root(DataConfig())), "imported")
    return _matching(known, incomplete)


def methods(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete methods, and strategies where the parameter takes both; after a comma or a plus the next one."""
    own = {name: entry.summary for name, entry in METHODS.items()}
    if param.name != "method" or ctx.command.name == "runs":
        own |= {name: entry.summary for name, entry in STRATEGIES.items() if name not in own}
    return _matching(own, incomplete, re.sub(r"[^,+]*$", "", incomplete))


def spaces(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete names of spaces, or else a file."""
    from ..sweeps.space import shipped

    return _matching(shipped(), incomplete) or path(ctx, incomplete, param)


def knobs(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete ``KNOB=``, and after it a value; with --grid the next value after a comma."""
    name, equals, value = incomplete.partition("=")
    if not equals:
        return _matching({name: knob.metadata["help"] for name, knob in KNOBS.items()}, incomplete, after="=")
    several = param.name == "grid" or (name in KNOBS and KNOBS[name].type == tuple[str, ...])
    before = re.sub(r"[^,[]*$" if several else r"[^+]*$" if name == "federation.strategy" else r".*$", "", value)
    return _matching(_values(name), incomplete, f"{name}={before}")


def _values(name: str) -> Iterable[str]:
    """Return the values that a knob takes, as far as they can be listed."""
    known: dict[str, Iterable[str]] = {
        "data.name": DATASETS, "method": METHODS, "federation.strategy": STRATEGIES, "model.classifier": CLASSIFIERS,
        "model.classifiers": CLASSIFIERS, "model.student": CLASSIFIERS,
    }  # fmt: skip
    if name in known or not dict.__contains__(KNOBS, name):  # plug-ins are not loaded
        return known.get(name, ())
    knob = KNOBS[name]
    words = {bool: ("true", "false")}.get(knob.type, ("auto",) if knob.kind != knob.type else ())
    return knob.metadata["choices"] or words


def names(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete a name below runs/ for `mosaic run`, below sweeps/ for a sweep."""
    return _matching(_names(ctx, "runs" if ctx.command.name == "run" else "sweeps"), incomplete)


def sweeps(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete the name of a sweep."""
    return _matching(_names(ctx, "sweeps"), incomplete)


def runs(ctx: click.Context, incomplete: str, param: click.Parameter) -> Items:
    """Complete the name of a run, SWEEP/TRIAL, or a folder."""
    sweep, slash, _ = incomplete.partition("/")
    found = _matching(_names(ctx, "runs"), incomplete) + _matching(_names(ctx, "sweeps"), incomplete, after="/")
    if slash and _PLAIN.fullmatch(sweep):
        found = _matching(_names(ctx, f"sweeps/{sweep}/trials"), incomplete, f"{sweep}/")
    return found or folder(ctx, incomplete, param)


def _names(ctx: click.Context, below: str) -> list[str]:
    """Return names of folders in the storage that the command line names; none for a bucket."""
    storage = ctx.params.get("storage") or "./mosaic_runs"
    with contextlib.suppress(OSError, ValueError), os.scandir(os.path.expanduser(f"{storage}/{below}")) as entries:
        return sorted(entry.name for entry in islice(entries, MOST_NAMES) if _PLAIN.fullmatch(entry.name))
    return []


#: What completes a parameter, by its name or by its command's and its own.
COMPLETERS: dict[str, Completer] = {
    "preset": presets, "algorithm": one_of(ALGORITHMS), "dataset": datasets, "fetch name": datasets,
    "sampler": one_of(KNOBS["partition.sampler"].metadata["choices"]), "host": one_of(("ray", "serial")),
    "method": methods, "methods": methods, "against": methods, "methods name": methods, "sets": knobs, "grid": knobs,
    "space": spaces, "search": one_of(("grid", "random", "optuna")), "scheduler": one_of(("fifo", "asha")),
    "address": one_of(("auto", "local")), "statuses": one_of(STATUSES), "shell": one_of(SHELLS), "a": runs, "b": runs,
    "track": one_of(TRACKERS), "to": one_of(("pt", "onnx", "torchscript", "hub")),
    "sweep": sweeps, "run name": names, "sweep name": names, "compare name": names, "config": path, "png": path,
    "out": path, "output": path, "cluster": path, "source": path, "storage": folder, "path": folder,
}  # fmt: skip
