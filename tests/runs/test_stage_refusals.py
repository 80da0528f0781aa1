"""What a stage would refuse is refused before Ray starts: every refusal in the stages' code, and a request for each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_requests import FILES, STAGES
from cli_runner import ask

import mosaic_ray

PACKAGE = Path(mosaic_ray.__file__).parent

#: Errors that no request causes, with what does.
NOT_OF_REQUESTS = {
    "pipeline/context.py:RunContext.stage": "adds the stage to an error",
    "pipeline/context.py:RunContext.note": "a health finding, under --strict-health",
    "pipeline/partition.py:deal": "nothing: a client has a sample at least, and half of them are held out at most",
    "methods/mosaic/client_uploads.py:train_generators": "adds the stage to an error",
    "methods/mosaic/server.py:_teach": "passes on the error of form_experts",
    "distillation/client_tasks.py:GeneratorTask.run": "divergence",
    "distillation/ensemble.py:descend": "divergence",
    "distillation/teacher_training.py:synthetic_prototypes": "divergence",
    "distillation/kmeans.py:kmeans": "divergence",
    "distillation/losses.py:inversion_probe.loss": "a caller's mistake",
    "federated/aggregation.py:RunningAverage.add": "a caller's mistake",
    "federated/aggregation.py:RunningAverage.result": "a caller's mistake",
    "federated/aggregation.py:PartialAverage.add": "a caller's mistake",
    "federated/aggregation.py:_checked": "a caller's mistake",
    "federated/aggregation.py:_check_names": "a caller's mistake",
    "federated/client.py:TrainTask._update": "divergence",
    "federated/static_batch_norm.py:with_statistics": "a caller's mistake",
    "federated/strategies/base.py:Strategy.channel_indices": "a plug-in that lacks a function",
    "federated/communication.py:Tally.__init__": "a damaged stored result, which is computed again",
    "methods/fens.py:train_gate.compute": "a damaged stored result, which is computed again",
    "methods/mosaic/server.py:_read_group": "a damaged stored result, which is computed again",
    "methods/rehearsal_choice.py:score_trials": "a damaged stored result, which is computed again",
    "methods/server_side.py:in_parts.compute": "a damaged stored result, which is computed again",
    "pipeline/evaluate.py:_check": "a damaged stored result, which is computed again",
    "pipeline/evaluate.py:evaluate": "a damaged stored result, which is computed again",
    "pipeline/personal.py:_check": "a damaged stored result, which is computed again",
    "pipeline/rounds.py:_Progress.resume": "a damaged stored result, which is computed again",
    "pipeline/stored.py:_require": "a damaged stored result, which is computed again",
}


def refusals(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the function of every ``raise SomeError(...)`` below ``node``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield ".".join(names)
        yield from refusals(child, (*names, child.name) if isinstance(child, ast.FunctionDef | ast.ClassDef) else names)


def test_every_refusal_of_a_stage_has_a_request_or_another_cause():
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}:{function}"
        for package in ("pipeline", "methods", "distillation", "federated")
        for path in (PACKAGE / package).rglob("*.py")
        for function in refusals(ast.parse(path.read_text()))
    }
    assert found == STAGES.keys() | NOT_OF_REQUESTS.keys()


@pytest.mark.parametrize(
    "words, parts",
    [request for requests in STAGES.values() for request in requests],
    ids=lambda one: " ".join(one)[-60:],
)
def test_a_stages_refusal_comes_before_ray_starts(words, parts, monkeypatch, tmp_path):
    import ray

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain_net.py").write_text(FILES["plain_net.py"])
    result = ask(*words)
    assert result.exit_code == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert all(part in line for part in parts), line
    assert line.startswith("mosaic: error: ") and "Traceback" not in result.stderr
