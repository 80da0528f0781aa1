"""Options that several commands take, and how commands print their results."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..config.presets import ALGORITHMS
from ..config.resolve import KNOBS
from ..core.errors import RequestError
from ..core.text import visible
from .request import parse_address

if TYPE_CHECKING:
    from ..execution.resource_plan import Node
    from ..runs.estimate import Hours

    UsedOf = Callable[[Sequence[Node]], Mapping[str, int]]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_SAMPLERS = ", ".join(KNOBS["partition.sampler"].metadata["choices"])

#: The options that make a configuration.
REQUEST: dict[str, Callable[..., Any]] = {
    "preset": click.option("--preset", metavar="NAME", help="A scale, an algorithm, or both as SCALE+ALGORITHM."),
    "algorithm": click.option("--algorithm", metavar="|".join(ALGORITHMS), help="Algorithm preset."),
    "dataset": click.option("--dataset", metavar="D", help="See `mosaic data list`; or folder:PATH, hf:OWNER/NAME."),
    "skip_bad": click.option("--skip-bad", flag_value="true", help="Leave out and count images that do not decode."),
    "clients": click.option("--clients", metavar="N", help="Number of clients."),
    "omega": click.option("--omega", metavar="W", help="Dirichlet concentration; small is skewed."),
    "sampler": click.option("--sampler", metavar="NAME", help=f"How labels are dealt: {_SAMPLERS}; or file:PATH."),
    "method": click.option("--method", metavar="M", help="See `mosaic methods`."),
    "seed": click.option("--seed", metavar="S", help="One seed for everything."),
    "host": click.option("--host", metavar="ray|serial", help="Where clients run."),
    "sets": click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any knob; see `mosaic show demo`."),
    "config": click.option("--config", metavar="FILE.toml", help="Knobs from a file."),
}

GRID = click.option(
    "--grid", multiple=True, metavar="KNOB=A,B,...", help="Try these values of a knob instead of a space; repeatable."
)

#: The options in ``RunOptions``.
_RUN: dict[str, Callable[..., Any]] = {
    "storage": click.option(
        "--storage", default="./mosaic_runs", show_default=True, metavar="PATH|URI", help="Where results lie."
    ),
    "name": click.option("--name", metavar="NAME", help="Folder of the results; named after the request by default."),
    "address": click.option(
        "--address", metavar="auto|local|HOST:PORT", help="The Ray cluster.  [default: local; auto if RAY_ADDRESS]"
    ),
    "strict_health": click.option(
        "--strict-health", is_flag=True, help="Stop a run where a health finding is an error; changes no result."
    ),
    "track": click.option(
        "--track", multiple=True, metavar="wandb|mlflow|trackio", help="Report to this tracker as well; repeatable."
    ),
    "fresh": click.option("--fresh", is_flag=True, help="Compute every stage again."),
    "as_json": click.option(
        "--json", "as_json", is_flag=True, help="The result as JSON on standard output, all else on standard error."
    ),
    "dry_run": click.option(
        "--dry-run", is_flag=True, help="Print what would run, on which resources and how much work it is; run nothing."
    ),
    "calibrate": click.option(
        "--calibrate", is_flag=True, help="With --dry-run: measure some steps here, to estimate the hours."
    ),
}


@dataclass(frozen=True)
class RunOptions:
    """The folder of the results, the Ray cluster, and how a command prints its results."""

    storage: str
    name: str | None
    address: str
    fresh: bool
    as_json: bool
    track: tuple[str, ...] = ()
    strict_health: bool = False
    dry_run: bool = False
    calibrate: bool = False


def common_options(*names: str) -> Decorator:
    """Add the options ``names`` to a command, in that order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = (REQUEST | _RUN)[name](command)
        return command

    return decorate


def run_options(*more: str) -> Decorator:
    """Add the options of ``RunOptions`` (``more`` names those with a default) to a command, which gets a ``place``."""
    names = ("storage", "name", "address", "track", "fresh", "as_json", *more)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(*args: Any, **options: Any) -> Any:
            own = {name: options[name] for name in names} | {"address": parse_address(options["address"])}
            if own["track"]:
                from ..tracking.backends import check_trackers

                own["track"] = check_trackers(own["track"])
            if own.get("calibrate") and not own["dry_run"]:
                raise RequestError("--calibrate: it goes with --dry-run")
            others = {name: value for name, value in options.items() if name not in own}
            return command(*args, place=RunOptions(**own), **others)

        return common_options(*names)(call)

    return decorate


def refuse_idle_address(ctx: click.Context, place: RunOptions, host: str) -> None:
    """Raise ``RequestError`` for a typed ``--address`` where no cluster is joined."""
    typed = ctx.get_parameter_source("address") is ParameterSource.COMMANDLINE
    if typed and host == "serial" and place.address != "local":
        raise RequestError(f"--address {place.address}: runtime.host = serial joins no cluster; give one of them")


def listing(title: str, rows: dict[str, str]) -> None:
    """Print names and their meaning in the layout of click's help."""
    formatter = click.HelpFormatter(width=80)
    with formatter.section(visible(title, "")):
        formatter.write_dl([(visible(name, ""), visible(words, "")) for name, words in rows.items()])
    click.echo(formatter.getvalue())


def print_parts(*parts: Any) -> None:
    """Print tables and lines of text through rich, without markup; long paths are never broken."""
    from rich.console import Console
    from rich.segment import Segment

    class Screen(Console):
        def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
            for text, style, control in super().render(*args, **options):
                yield Segment(text if control else visible(text), style, control)

    console = Screen(markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part, crop=False, soft_wrap=isinstance(part, str))


def print_result(as_json: bool, content: Mapping[str, Any], *parts: Any) -> None:
    """Print ``content`` as JSON; without ``as_json`` print ``parts``, which show it to a reader."""
    if as_json:
        click.echo(json.dumps(content, indent=2))
    else:
        print_parts(*parts)


def print_plan(
    place: RunOptions, content: Mapping[str, Any], hours: Hours | None, used_of: UsedOf, *parts: Any
) -> None:
    """Print a dry run with its hours, and with dollars on a cluster's head; ``used_of``: see there."""
    from ..deploy.prices import cost_on_head

    cost = cost_on_head(used_of, hours) if hours and place.address != "local" else None
    lines = [hours.line()] if hours else []
    lines += [f"dollars: {cost.line}"] if cost else []
    print_result(place.as_json, {**content, "dollars": cost and cost.dollars}, *parts, *lines)


def stdout_for_json(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep standard output for the JSON: with ``as_json`` all other output goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
