"""Models of samples of several modalities: as modules and as files they answer as the run measured."""

from __future__ import annotations

import io
import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_runner import ask, refusal, refused_by
from helpers import TINY
from signs import FACTS, MODALITIES, REHEARSAL, SOME, signs, signs_dataset

from mosaic_ray import load_model, load_run
from mosaic_ray.config.resolve import override
from mosaic_ray.core.seeding import stream
from mosaic_ray.core.types import DataFacts, ImageSet, Modality
from mosaic_ray.data.modality_sources import tokens
from mosaic_ray.data.records import in_subsets, present_in, restrict, standardise, sums_of, unpack
from mosaic_ray.data.transforms import to_input
from mosaic_ray.distillation.generator_training import NUM_EVALUATED, draw
from mosaic_ray.federated.evaluation import accuracy, confusion
from mosaic_ray.report.api import Run
from mosaic_ray.report.model_files import ONNX, arguments, inputs_of, outputs_of
from mosaic_ray.report.models import SampleClassifier
from mosaic_ray.runs import runner

TEST = signs_dataset().test
PLAIN = {"method": "fedavg", "partition.modalities": SOME, "warmup.num_rounds": 1, "finetune.num_rounds": 1}


def made(folder: Path, knobs: dict) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: signs_dataset())
        patch.setattr("mosaic_ray.data.load.known_facts", lambda config: FACTS)
        found = runner.run(override(TINY, knobs), storage=str(folder), progress=False)
    return load_run(found["paths"]["run"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("m"), REHEARSAL)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Run:
    knobs = {"algorithm": "distilled", "generator.family": "cvae", "method": "mosaic", "partition.modalities": SOME}
    return made(tmp_path_factory.mktemp("t"), knobs)


def asked_of(samples: ImageSet) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return samples as a model takes them: values by name, and the mask."""
    found = {name: torch.tensor(value) for name, value in unpack(MODALITIES, samples.images).items()}
    return found, torch.tensor(present_in(MODALITIES, samples.images))


def in_all_sets() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    samples = ImageSet(in_subsets(MODALITIES, TEST.images), np.tile(TEST.labels, 7))
    return asked_of(samples)


def table(module: SampleClassifier) -> np.ndarray:
    with torch.no_grad():
        return confusion(module(*in_all_sets()).numpy(), np.tile(TEST.labels, 7))


@pytest.mark.parametrize("role", ["initial", "control", "final"])
def test_roles_answer_as_the_run_measured(run: Run, role: str) -> None:
    module = run.model(role)
    assert isinstance(module, SampleClassifier) and not module.training
    assert np.array_equal(table(module), run.confusion(role))
    assert accuracy(table(module)) == run.accuracy(role)


@pytest.mark.parametrize("role", ["teacher", "distilled"])
def test_a_teacher_and_its_student_answer_as_the_run_measured(taught: Run, role: str) -> None:
    assert np.array_equal(table(taught.model(role)), taught.confusion(role))


def test_preprocessing_is_the_runs(run: Run) -> None:
    module = run.model()
    values, present = in_all_sets()
    train, chosen = signs(240, 0), run.result("partition").load("shards")["train"]
    held = {0: "", 1: "v", 2: "v"}  # clients 1 and 2 hold the vector
    sizes = run.result("partition").load("shards")["train_sizes"]
    rows = [part for k, part in enumerate(np.split(chosen, np.cumsum(sizes)[:-1])) if held[k]]
    vector = MODALITIES[2]
    sums = sum(sums_of(vector, unpack(MODALITIES, train.images[part])["v"]) for part in rows)
    records = standardise(MODALITIES, in_subsets(MODALITIES, TEST.images), {"v": sums})
    assert torch.equal(module.rows(values, present), to_input(torch.tensor(records), FACTS))


def test_what_is_not_named_is_absent_and_absent_values_are_not_read(run: Run) -> None:
    module = run.model()
    values, _ = asked_of(TEST)
    alone = module({"text": values["text"]})
    only = torch.tensor([[False, True, False]]).expand(len(TEST), -1)
    odd = values | {"v": torch.full_like(values["v"], torch.nan), "image": values["image"].float() / 255}
    assert torch.equal(alone, module(odd, only))
    assert not torch.equal(alone, module(values))
    assert torch.allclose(module(values), module(values | {"image": values["image"].float() / 255}))
    for wrong in ({}, {"sound": values["v"]}):
        with pytest.raises(ValueError, match="image, text, v"):
            module(wrong)


def test_generators_give_their_clients_modalities_in_the_data_sets_units(run: Run) -> None:
    for k, kept in run.samples().items():
        module = run.model(generator=k)
        z, labels = draw(module.network, NUM_EVALUATED, stream(0, "generator/judge", k), torch.device("cpu"))
        found = module(z, labels)
        assert "+".join(found) == SOME[k]
        rows = module.network(z, labels).detach()
        if "image" in found:
            assert np.array_equal(found["image"][: len(kept)].detach().numpy(), kept)
        if "text" in found:
            assert np.array_equal(found["text"].numpy(), rows[:, 64:70].numpy())
        if "v" in found:
            assert torch.allclose(module.vectors.standardised("v", found["v"].detach()), rows[:, 70:74], atol=1e-5)
            assert abs(float(found["v"].detach().mean()) - 7.75) < 3  # the vectors' own mean is 7 + 0.5 x 1.5
    assert len(next(iter(module(5).values()))) == 5
    with pytest.raises(ValueError, match="z and labels"):
        module(z)


def test_the_generators_of_a_gan_are_found_from_the_configuration_alone(tmp_path: Path) -> None:
    run = made(tmp_path, REHEARSAL | {"generator.family": "cgan"})
    assert list(run.generators) == [0, 1, 2] and [*run.model(generator=1)(3)] == ["text", "v"]


def test_texts_become_the_data_sets_tokens(run: Run) -> None:
    facts = DataFacts("x", 2, 1, 8, (0.0,), (1.0,), modalities=(Modality("t", "text", (8,), 257),))
    module = SampleClassifier(torch.nn.Identity(), facts, {"standardisation": {}})
    assert np.array_equal(module.tokens(["é", "a long text"]).numpy(), [tokens("é", 8), tokens("a long text", 8)])
    with pytest.raises(ValueError, match="no text of bytes"):
        run.model().tokens(["a"])  # this data set's tokens are its own


# --- files -----------------------------------------------------------------------------------------------------------


def exported(run: Run, tmp_path: Path, *words: str) -> Path:
    result = ask("export", str(run.folder), "--output", str(tmp_path / "out"), *words)
    assert result.exit_code == 0, result.stderr
    return tmp_path / "out"


def check_close(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for left, right in zip(found, wanted, strict=True):
        far = np.abs(left.astype(float) - right)
        assert far.max() <= (1 if right.dtype == np.uint8 else 1e-5 * max(1, np.abs(right).max()))


@pytest.mark.parametrize("role", ["final", "client:1", "generator:0"])
@pytest.mark.parametrize("to", ["pt", "hub"])
def test_weights_with_their_description_read_back(to: str, role: str, run: Run, tmp_path: Path) -> None:
    place, module = exported(run, tmp_path, "--to", to, "--role", role), run.model(role)
    again, given = load_model(place), arguments(module, inputs_of(module))
    assert again.config == module.config
    for found, wanted in zip(outputs_of(_detached(again(*given))), outputs_of(_detached(module(*given))), strict=True):
        assert np.array_equal(found, wanted)


def _detached(found: object) -> object:
    return {name: part.detach() for name, part in found.items()} if isinstance(found, dict) else found.detach()


@pytest.mark.parametrize("role", ["final", "client:1", "generator:0"])
def test_torchscript_answers_alike(role: str, run: Run, tmp_path: Path) -> None:
    place, module = exported(run, tmp_path, "--to", "torchscript", "--role", role), run.model(role)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.jit is deprecated
        again = torch.jit.load(io.BytesIO(place.read_bytes()))
    given = arguments(module, inputs_of(module, 11))
    with torch.no_grad():
        check_close(outputs_of(again(*given)), outputs_of(module(*given)))


def check_onnx(run: Run, role: str, place: Path) -> None:
    runtime, module = pytest.importorskip("onnxruntime"), run.model(role)
    session, inputs = runtime.InferenceSession(str(place)), inputs_of(module, 11)
    assert [entry.name for entry in session.get_inputs()] == list(inputs)
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        check_close(found, outputs_of(module(*arguments(module, inputs))))
    named = [entry.name for entry in session.get_outputs()]
    assert named == (SOME[0].split("+") if role == "generator:0" else ["logits"])


@pytest.mark.parametrize("role", ["final", "generator:0"])
def test_onnx_runtime_answers_alike(role: str, run: Run, tmp_path: Path) -> None:
    [pytest.importorskip(package) for package in ONNX]
    check_onnx(run, role, exported(run, tmp_path, "--to", "onnx", "--role", role))


def test_a_teacher_goes_into_onnx(taught: Run, tmp_path: Path) -> None:
    [pytest.importorskip(package) for package in ONNX]
    check_onnx(taught, "teacher", exported(taught, tmp_path, "--to", "onnx", "--role", "teacher"))


@pytest.mark.parametrize("fusion", ["mean", "gated", "zero_fill", "prototypes"])
def test_every_fusion_goes_into_onnx(fusion: str, tmp_path: Path) -> None:
    [pytest.importorskip(package) for package in ONNX]
    knobs = {"model.fusion": fusion} | ({"federation.strategy": "pmcmfl"} if fusion == "prototypes" else {})
    run = made(tmp_path / "s", PLAIN | knobs)
    assert np.array_equal(table(run.model()), run.confusion("final"))
    check_onnx(run, "final", exported(run, tmp_path, "--to", "onnx"))


def test_narrow_clients_are_used_as_they_were_trained(tmp_path: Path) -> None:
    knobs = {"model.fusion": "mean", "federation.strategy": "heterofl", "federation.widths": (1.0, 0.5)}
    run = made(tmp_path / "s", PLAIN | knobs)
    place, module = exported(run, tmp_path, "--role", "client:1"), run.model(client=1)
    given = arguments(module, inputs_of(module))
    assert module.scale == 0.5 and torch.equal(load_model(place)(*given), module(*given))


def test_the_card_names_the_modalities_and_its_snippet_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("final", "generator:1"):
        text = (run.export("hub", role, tmp_path / "name", force=True) / "README.md").read_text()
        assert "image (1 x 8 x 8 pixels), text (6 tokens), v (4 numbers)" in text
        assert "image+text, text+v, image+v" in text and "mean over the sets" in text
        assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "other"
        fake = types.SimpleNamespace(snapshot_download=lambda name: tmp_path / "name")
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        names: dict[str, object] = {"samples": asked_of(TEST)[0]}
        exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
        assert len(names["logits"] if role == "final" else names["samples"]["v"]) == (80 if role == "final" else 16)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_run_without_its_store_has_its_final_model(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "alone")
    given = asked_of(TEST)
    assert torch.equal(load_run(tmp_path / "alone").model()(*given), run.model()(*given))


@pytest.mark.parametrize(
    "wrong", [{}, {"v": {"mean": [0.0] * 4, "scale": [1.0] * 3}}, {"v": {"mean": [0.0] * 4, "scale": [-1.0] * 4}}, [1],
              {"v": {"mean": [None] * 4, "scale": [1.0] * 4}}],
)  # fmt: skip
def test_damaged_standardisation_is_refused_in_one_line(wrong: object, run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "alone")
    file = tmp_path / "alone" / "label_counts.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"standardisation": wrong}))
    assert "standardisation" in refused_by(load_run, tmp_path / "alone")
    file.write_text(json.dumps({name: value for name, value in kept.items() if name != "standardisation"}))
    assert "earlier version" in refused_by(load_run(tmp_path / "alone").model)
    place = run.export("hub", output=tmp_path / "hub")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"standardisation": wrong}))
    assert "standardisation" in refused_by(load_model, place)


def test_a_modality_with_the_name_of_another_input_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    [pytest.importorskip(package) for package in ONNX]
    module = run.model()
    module.config["data"]["modalities"][0]["name"] = "present"
    monkeypatch.setattr("mosaic_ray.report.model_files.model_of", lambda *_: module)
    assert "called present" in refusal(ask("export", str(run.folder), "--to", "onnx", "--output", "/tmp/nowhere.onnx"))


def test_restricted_records_are_absent_modalities(run: Run) -> None:
    module = run.model()
    kept = restrict(MODALITIES, TEST.images, np.array([True, False, True]))
    values, _ = asked_of(TEST)
    assert torch.equal(module(*asked_of(ImageSet(kept, TEST.labels))), module({n: values[n] for n in ("image", "v")}))
