"""Tracking: files that can be read back, replays that equal the original, and a view that stays sane."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminals import Clock, Terminal

import mosaic_ray.tracking.tracker as tracking
from mosaic_ray.core.errors import RunError
from mosaic_ray.data.image_ops import image_grid
from mosaic_ray.storage.store import Store
from mosaic_ray.tracking import progress
from mosaic_ray.tracking.tracker import Tracker

ESCAPE = "\x1b"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "_now", clock)
    return clock


@pytest.fixture
def tty(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "120")
    return tty


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def metrics(run_dir: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ---------------------------------------------------------------- plain lines


def test_plain_lines_show_begin_first_round_tenths_and_end(clock: Clock) -> None:
    stream = Terminal(tty=False)
    with Tracker(None, stream=stream) as tracker, tracker.stage("warmup", 40) as stage:
        assert lines(stream) == ["warmup: begins, round 0/40"]
        for number in range(40):
            clock.now += 0.5
            stage.advance(note=f"loss {number}")
            if number == 0:
                assert lines(stream)[1:] == ["warmup: round 1/40, 2 round/s, 0:20 left, loss 0"]
    assert lines(stream)[2:4] == [
        "warmup: round 4/40, 2 round/s, 0:18 left, loss 3",
        "warmup: round 8/40, 2 round/s, 0:16 left, loss 7",
    ]
    assert lines(stream)[-2:] == ["warmup: round 40/40, 2 round/s, 0:00 left, loss 39", "warmup: done after 20.0 s"]
    assert len(lines(stream)) == 1 + 1 + 10 + 1 and ESCAPE not in stream.getvalue()


def test_plain_lines_of_a_slow_stage_come_every_ten_seconds(clock: Clock) -> None:
    stream = Terminal(tty=False)
    with Tracker(None, stream=stream) as tracker:
        with tracker.stage("distill", 100_000, "step") as stage:
            for _ in range(40):
                clock.now += 1.0
                stage.advance()
        with tracker.stage("fetch", unit="file") as stage:
            clock.now += 4.0
            stage.advance(2)
    assert lines(stream) == [
        "distill: begins, step 0/100000",
        "distill: step 1/100000, 1 step/s, 27:46:39 left",
        "distill: step 11/100000, 1 step/s, 27:46:29 left",
        "distill: step 21/100000, 1 step/s, 27:46:19 left",
        "distill: step 31/100000, 1 step/s, 27:46:09 left",
        "distill: done after 40.0 s",
        "fetch: begins",
        "fetch: file 2, 2 s/file",
        "fetch: done after 4.0 s",
    ]


def test_the_pace_after_a_resume_counts_only_what_was_done_since(clock: Clock) -> None:
    stream = Terminal(tty=False)
    with Tracker(None, stream=stream) as tracker, tracker.stage("warmup", 10) as stage:
        stage.resume([], 8)
        clock.now += 3.0
        stage.advance()
        assert lines(stream)[1:] == ["warmup: resumed at round 8/10", "warmup: round 9/10, 3 s/round, 0:03 left"]


def test_a_stage_that_found_nothing_is_not_resumed(clock: Clock) -> None:
    stream = Terminal(tty=False)
    with Tracker(None, stream=stream) as tracker, tracker.stage("generators", 5, "client") as stage:
        stage.resume([], 0)
        assert lines(stream) == ["generators: begins, client 0/5"]


def test_a_failing_stage_has_stopped_and_a_cached_one_is_cached(clock: Clock) -> None:
    stream = Terminal(tty=False)

    def interrupted() -> None:
        with Tracker(None, stream=stream) as tracker:
            tracker.replay("partition", [])
            with tracker.stage("warmup", 10):
                clock.now += 2.0
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert lines(stream) == ["partition: cached", "warmup: begins, round 0/10", "warmup: stopped after 2.0 s"]


@pytest.mark.parametrize("tty_stream", [True, False])
def test_quiet_is_quiet_but_for_messages(tty_stream: bool) -> None:
    stream = Terminal(tty_stream)
    with Tracker(None, stream=stream, progress=False) as tracker:
        tracker.replay("partition", [])
        with tracker.stage("warmup", 2) as stage:
            stage.advance(2, "loss 1")
            stage.resume([], 1)
            tracker.say("a word")
            tracker.warn("take care")
    assert lines(stream) == ["a word", "warning: take care"]


def test_the_stream_is_standard_error_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(None) as tracker:
        tracker.say("a word")
    assert capsys.readouterr() == ("", "a word\n")


# ---------------------------------------------------------------- metrics.jsonl


def test_metrics_are_one_object_a_line_readable_at_once(tmp_path: Path) -> None:
    heard: list[tuple[str, int, float]] = []

    def hear(tag: str, step: int, value: float) -> None:
        heard.append((tag, step, value))

    (tmp_path / "metrics.jsonl").write_text("of an earlier run\n")
    with Tracker(tmp_path, progress=False, tensorboard=False, on_metric=hear) as tracker:
        assert metrics(tmp_path) == []
        with tracker.stage("warmup") as stage:
            stage.scalar("global/loss", 1, float(np.float32(0.1)))
            first = {"stage": "warmup", "tag": "global/loss", "step": 1, "value": float(np.float32(0.1))}
            assert metrics(tmp_path) == [first]
            stage.scalar("global/loss", 2, math.nan)
            stage.scalar("global/loss", 3, -math.inf)
            tracker.image("image", 1, np.zeros((4, 4), np.uint8))
            tracker.histogram("weights", 1, np.zeros(3))
            tracker.text("config", "no board, no text")
            assert [step for _, step, _ in stage.recorded] == [1, 2, 3]
            assert [value for _, _, value in stage.recorded] == [first["value"], None, None]
    assert [line["value"] for line in metrics(tmp_path)] == [first["value"], None, None]
    assert [step for _, step, _ in heard] == [1, 2, 3] and math.isnan(heard[1][2]) and heard[2][2] == -math.inf
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


VALUES = st.lists(st.tuples(st.sampled_from(["a/b", "ü"]), st.integers(0, 9), st.floats()), max_size=8)


@given(VALUES, st.integers(0, 8))
def test_O12_replayed_and_resumed_metrics_equal_the_undisturbed(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, int, float]], at: int
) -> None:
    """Through the store, as the driver does it: undisturbed, killed at ``at`` and resumed, and cached."""
    store = Store(tmp_path_factory.mktemp("store"))
    curves = []
    undisturbed, resumed, cached = (tmp_path_factory.mktemp(name) for name in ("undisturbed", "resumed", "cached"))

    with Tracker(undisturbed, progress=False, tensorboard=False) as tracker, tracker.stage("warmup") as stage:
        for tag, step, value in values:
            stage.scalar(tag, step, value)
        curves.append(stage.recorded)
    with Tracker(resumed, progress=False, tensorboard=False) as tracker, tracker.stage("warmup") as stage:
        for tag, step, value in values[:at]:
            stage.scalar(tag, step, value)
        store.save_checkpoint("k-1", {"recorded": stage.recorded}, {})
    with Tracker(resumed, progress=False, tensorboard=False) as tracker, tracker.stage("warmup") as stage:
        checkpoint = store.load_checkpoint("k-1")
        assert checkpoint is not None
        stage.resume(checkpoint.facts["recorded"], at)
        for tag, step, value in values[at:]:
            stage.scalar(tag, step, value)
        curves.append(store.put("k-1", {"recorded": stage.recorded}).facts["recorded"])
    with Tracker(cached, progress=False, tensorboard=False) as tracker:
        tracker.replay("warmup", curves[1])
    texts = [(folder / "metrics.jsonl").read_bytes() for folder in (undisturbed, resumed, cached)]
    assert curves[0] == curves[1] and texts[0] == texts[1] == texts[2]
    assert len(texts[0].splitlines()) == len(values)


def test_a_run_folder_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run folder .*file/run: Not a directory"):
        Tracker(tmp_path / "file" / "run", progress=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(RunError, match="No space left"),
        Tracker(tmp_path, progress=False, tensorboard=False) as tracker,
        tracker.stage("warmup") as stage,
    ):
        stage.scalar("loss", 1, 1.0)


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_files_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.of.an.earlier.run").write_text("")
    flushed: list[object] = []
    with Tracker(tmp_path, progress=False) as tracker:
        with monkeypatch.context() as patch, tracker.stage("warmup") as stage:
            patch.setattr(SummaryWriter, "flush", flushed.append)
            for step in range(100):
                stage.scalar("student/accuracy", step, step / 128)
        assert not flushed, "a flush for each scalar would be slow"
        with tracker.stage("generators") as stage:
            tracker.image("colour", 3, image_grid(np.zeros((4, 3, 8, 8), np.uint8), 2))
            tracker.image("grey", 3, np.zeros((5, 7), np.uint8))
            tracker.image("one channel", 3, np.zeros((1, 5, 7), np.uint8))
            tracker.histogram("weights", 1, np.array([[1.0, np.nan], [2.0, np.inf]]))
            tracker.histogram("nothing finite", 1, np.array([np.nan]))
            tracker.text("config", "**bold**")
        tracker.replay("teacher", [["teacher/accuracy", 5, 0.25]])
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("student/accuracy")] == [(s, s / 128) for s in range(100)]
    assert [(e.step, e.value) for e in events.Scalars("teacher/accuracy")] == [(5, 0.25)]
    sizes = {tag: (events.Images(tag)[0].height, events.Images(tag)[0].width) for tag in events.Tags()["images"]}
    assert sizes == {"colour": (17, 17), "grey": (5, 7), "one channel": (5, 7)}
    assert events.Tags()["histograms"] == ["weights"] and events.Histograms("weights")[0].histogram_value.num == 2
    assert any("config" in tag for tag in events.Tags()["tensors"])


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    code = (
        "import sys; from mosaic_ray.tracking.tracker import Tracker\n"
        "with Tracker(None) as t, t.stage('s', 2) as s: s.advance(); s.scalar('a', 1, 1.0)\n"
        "print([m for m in ('torch', 'tensorboard', 'ray', 'rich', 'pandas') if m in sys.modules])"
    )
    path = os.pathsep.join([str(Path(tracking.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n", done.stderr


# ---------------------------------------------------------------- the live view


def refreshed(tracker: Tracker, stream: Terminal) -> str:
    """What the live view shows now, without the terminal's control codes."""
    from rich.text import Text

    stream.truncate(0)
    stream.seek(0)
    tracker.display.progress.refresh()  # type: ignore[attr-defined]
    return Text.from_ansi(stream.getvalue()).plain


def row(shown: str, name: str) -> str:
    (line,) = [line for line in shown.splitlines() if f" {name} " in line]
    return " ".join(word for word in line.split() if set(word) - set("━╸╺"))


def test_the_live_view_has_a_row_for_each_stage(clock: Clock, tty: Terminal) -> None:
    with Tracker(None, stream=tty) as tracker:
        tracker.replay("partition", [])
        with tracker.stage("warmup", 10) as stage:
            stage.resume([], 2)
            clock.now += 6.0
            stage.advance(2, note="loss [bold]1.5[/oops]")
            shown = refreshed(tracker, tty)
            assert row(shown, "partition") == "✓ partition cached"
            assert row(shown, "warmup") == "> warmup round 4/10 0:06 3 s/round 0:18 left loss [bold]1.5[/oops]"
        with tracker.stage("fetch", unit="file") as stage:
            stage.advance()
            shown = refreshed(tracker, tty)
            assert row(shown, "warmup").startswith("✓ warmup 6.0 s")
            assert row(shown, "fetch") == "> fetch file 1 0:00"
        tracker.say("markup is [red]text")
        tracker.warn("x" * 300)
    text = tty.getvalue()
    assert "markup is [red]text\n" in text and "warning: " + "x" * 300 in text


def test_an_error_leaves_the_terminal_sane_and_a_later_stage_goes_on(tty: Terminal) -> None:
    hide, show = f"{ESCAPE}[?25l", f"{ESCAPE}[?25h"
    tracker = Tracker(None, stream=tty)
    before = sys.stderr

    def interrupted() -> None:
        with tracker.stage("warmup", 10) as stage:
            stage.advance()
            assert tty.getvalue().rindex(hide) > tty.getvalue().rfind(show)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sys.stderr is before, "what rich redirects is put back"
    assert tty.getvalue().rindex(show) > tty.getvalue().rindex(hide)
    with tracker.stage("again", 1):
        assert row(refreshed(tracker, tty), "warmup") == "x warmup round 1/10 stopped"
    tracker.close()
    tracker.close()
    assert show in tty.getvalue() and hide not in tty.getvalue().rsplit(show, 1)[1]


def test_the_view_costs_little(clock: Clock, tty: Terminal) -> None:
    plain = Terminal(tty=False)
    with Tracker(None, stream=plain) as tracker, tracker.stage("distill", 10_000, "step") as stage:
        for _ in range(10_000):
            stage.advance()
    assert plain.flushes == len(lines(plain)) == 1 + 1 + 10 + 1
    with Tracker(None, stream=tty) as tracker, tracker.stage("distill", 10_000, "step") as stage:
        before = tty.flushes
        for _ in range(10_000):
            stage.advance()
        assert tty.flushes - before < 100


def test_a_dumb_terminal_gets_plain_lines(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Tracker(None, stream=tty) as tracker, tracker.stage("warmup", 2) as stage:
        stage.advance()
    assert lines(tty)[0] == "warmup: begins, round 0/2" and ESCAPE not in tty.getvalue()


# ---------------------------------------------------------------- grids


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(1, 3))
def test_every_image_stands_in_its_cell(count: int, columns: int, channels: int, height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (count, channels, height, width), np.uint8)
    grid = image_grid(images, columns)
    across = min(columns, count)
    assert grid.dtype == np.uint8
    assert grid.shape == (channels, math.ceil(count / across) * (height + 1) - 1, across * (width + 1) - 1)
    seen = np.full_like(grid, 255)
    for index in range(count):
        for y in range(height):
            for x in range(width):
                at = (slice(None), index // across * (height + 1) + y, index % across * (width + 1) + x)
                seen[at] = images[index, :, y, x]
    assert (grid == seen).all()
