"""A sweep's progress view."""

from __future__ import annotations

import io
import re

import pytest
from rich.text import Text
from terminals import Clock, Terminal

from mosaic_ray.sweeps import console
from mosaic_ray.sweeps.console import SweepView

LAMBDA_E, OMEGA = "generator.lambda_e", "partition.omega"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "_now", clock)
    return clock


def test_plain_lines(clock: Clock) -> None:
    stream = io.StringIO()
    with SweepView(4, stream=stream) as view:
        view.begin("p000s0", "a")
        view.stage("p000s0", "warmup", "found")
        clock.now += 30
        view.end("p000s0", "done", 0.5, "a")
        view.begin("p001s0", "b")
        clock.now += 10
        view.end("p001s0", "failed", None, "b")
        view.say("b failed", "warning")
        view.begin("p002s0", "c")
        clock.now += 20
        view.end("p002s0", "stopped", 0.9, "c")
        view.begin("p003s0", "d")
        view.end("p003s0", "done", 0.75, "d")
    assert stream.getvalue().splitlines() == [
        "a: begins",
        "[1/4] a: selection 50.0%, best so far 50.0% (a), 1:30 left",
        "b: begins",
        "[2/4] b: failed, best so far 50.0% (a), 0:40 left",
        "warning: b failed",
        "c: begins",
        "[3/4] c: stopped early, best so far 50.0% (a), 0:20 left",
        "d: begins",
        "[4/4] d: selection 75.0%, best so far 75.0% (d), 0:00 left",
    ]


def test_time_left(clock: Clock) -> None:
    with SweepView(20, stream=io.StringIO()) as view:
        for _ in range(10):
            view.found("done", 0.9, "old")
        assert view.seconds_left() is None
        view.begin("a", "a")
        view.begin("b", "b")
        clock.now += 5
        view.end("a", "failed", None, "a")
        assert view.seconds_left() is None, "a trial that failed at once gives no pace"
        view.begin("c", "c")
        clock.now += 95
        view.end("b", "done", 0.5, "b")
        # two ended in 52.5 s on average; c has run for 95 s, seven are to come, two at a time
        assert view.seconds_left() == pytest.approx(7 * 52.5 / 2)
        for trial in "defghij":
            view.begin(trial, trial)
            view.end(trial, "done", 0.5, trial)
        assert view.seconds_left() is None, "the last one is overdue"
        view.end("c", "done", None, "c")
        assert view.seconds_left() == 0.0
    lines = view._plain.stream.getvalue().splitlines()
    assert "[11/20] a: failed, best so far 90.0% (old), time left unknown" in lines
    assert lines[-1] == "[20/20] c: done, best so far 90.0% (old), 0:00 left"


def test_the_best_is_shown_within_a_setting() -> None:
    with SweepView(3, stream=io.StringIO()) as view:
        view.end("a", "done", 0.9, "easy", "omega 1")
        view.end("b", "done", 0.5, "hard", "omega 0.01")
        view.end("c", "done", 0.4, "harder", "omega 0.01")
    lines = view._plain.stream.getvalue().splitlines()
    assert [line.rpartition("best so far ")[2].partition(",")[0] for line in lines] == [
        "90.0% (easy)", "50.0% (hard)", "50.0% (hard)",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_without_progress_only_messages_are_shown(tty: Terminal, terminal: bool) -> None:
    stream = tty if terminal else io.StringIO()
    with SweepView(2, stream=stream, progress=False) as view:
        view.begin("a", "a")
        view.stage("a", "warmup")
        view.say("a [red]word")
        view.end("a", "done", 0.5, "a")
        view.say("take care", "warning")
    assert stream.getvalue() == "a [red]word\nwarning: take care\n"


def shown(view: SweepView, stream: Terminal) -> list[str]:
    """What the live view shows now, without the terminal's control codes."""
    stream.truncate(0)
    stream.seek(0)
    assert view._live is not None
    view._live.refresh()
    return [line.rstrip() for line in Text.from_ansi(stream.getvalue()).plain.splitlines() if line.strip()]


def test_the_live_view(clock: Clock, tty: Terminal) -> None:
    with SweepView(18, stream=tty) as view:
        for _ in range(3):
            view.found("done", None, "old")
        view.begin("p003s0", "lambda_e=[bold]1")
        assert shown(view, tty)[1] == "0:00 elapsed, time left unknown"
        clock.now += 60
        view.end("p003s0", "done", 0.875, "lambda_e=[bold]1")
        view.begin("p004s0", "lambda_e=[bold]2")
        view.begin("p005s0", "lambda_e=" + "3" * 100)
        view.stage("p004s0", "warmup", "found")
        clock.now += 30
        view.stage("p004s0", "generators")
        view.stage("p999s0", "warmup")
        head, times, best, first, second = shown(view, tty)
        assert re.sub(r"[━╸╺ ]+", " ", head) == "sweep 4 done, 2 running of 18"
        assert times == "1:30 elapsed, 6:30 left"
        assert best == "best so far 87.5% (lambda_e=[bold]1)"
        assert first.split() == [">", "lambda_e=[bold]2", "generators", "0:30"]
        assert second.startswith("> lambda_e=333") and second.endswith("  0:30") and len(second) <= 80
        view.end("p005s0", "failed", None, "")
        view.end("p004s0", "stopped", 0.99, "")
        head, _, best = shown(view, tty)
        assert head.endswith("4 done, 1 stopped early, 1 failed, 0 running of 18") and "87.5%" in best
        view.say("markup is [red]text")
        view.say("x" * 300, "warning")
    text = tty.getvalue()
    assert "markup is [red]text\n" in text and "warning: " + "x" * 300 in text
    assert "begins" not in text


def test_an_error_restores_the_terminal(tty: Terminal) -> None:
    hide, show = "\x1b[?25l", "\x1b[?25h"

    def interrupted() -> None:
        with SweepView(2, stream=tty) as view:
            view.begin("a", "a")
            assert tty.getvalue().rindex(hide) > tty.getvalue().rfind(show)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tty.getvalue().rindex(show) > tty.getvalue().rindex(hide)


def test_a_dumb_terminal_gets_plain_lines(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with SweepView(2, stream=tty) as view:
        view.begin("a", "a")
    assert tty.getvalue() == "a: begins\n"


def test_a_terminal_without_unicode_gets_the_live_view_too(monkeypatch: pytest.MonkeyPatch, tty: Terminal) -> None:
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    with SweepView(2, stream=tty) as view:
        view.begin("a", "a" * 200)
        view.end("a", "done", 0.5, "b" * 200)
        view.begin("c", "c" * 200)
        assert len(shown(view, tty)) == 4
    assert tty.getvalue().isascii()
