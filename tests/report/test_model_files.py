"""`mosaic export`: every format reads back to the same answers; places, packages and roles that are not there."""

from __future__ import annotations

import io
import json
import pickle
import re
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
from helpers import TINY, stripes_dataset
from pages import DOCS, blocks, commands

from mosaic_ray import load_model, load_run
from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RunError
from mosaic_ray.distillation import meta_model
from mosaic_ray.report import model_files, models
from mosaic_ray.report.api import Run
from mosaic_ray.report.model_files import ONNX, inputs_of
from mosaic_ray.runs import runner

IMAGES = torch.tensor(stripes_dataset().test.images)
OWN = (
    "import torch.nn as nn\n"
    "def build(num_classes, channels, image_size, width):\n"
    "    return nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n"
    "                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes))\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run with labelled generators, a narrow client and class names that are markup."""
    data = stripes_dataset()
    hostile = type(data)(data.facts, data.train, data.test, ("top", "<b>*middle*", "a|b"), "stripes")
    knobs = {"generator.family": "cvae", "generator.steps": 2, "federation.widths": [1.0, 0.5, 1.0]}
    knobs |= {"federation.strategy": "heterofl", "data.root": "/home/somebody/data"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mosaic_ray.data.load.load_dataset", lambda config: hostile)
        made = runner.run(override(TINY, knobs), storage=str(tmp_path_factory.mktemp("m")), progress=False)
    return load_run(made["paths"]["run"])


def exported(run: Run, tmp_path: Path, *words: str) -> Path:
    result = ask("export", str(run.folder), "--output", str(tmp_path / "out"), *words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    return tmp_path / "out"


@pytest.mark.parametrize("role", ["final", "client:1", "generator:0"])
@pytest.mark.parametrize("to", ["pt", "hub"])
def test_weights_with_their_description_read_back(to, role, run, tmp_path):
    place, module = exported(run, tmp_path, "--to", to, "--role", role), run.model(role)
    again, inputs = load_model(place), inputs_of(module).values()
    assert torch.equal(again(*inputs), module(*inputs)) and again.config == module.config
    if to == "pt":
        kept = torch.load(place, weights_only=True)
        assert kept["config"]["role"] == role
        assert kept["state_dict"].keys() == module.network.state_dict().keys()
    else:
        assert {path.name for path in place.iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("role", ["final", "teacher", "client:1", "generator:0"])
def test_torchscript_answers_alike_for_any_batch_and_both_types(role, run, tmp_path):
    place, module = exported(run, tmp_path, "--to", "torchscript", "--role", role), run.model(role)
    files = {"config.json": ""}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.jit is deprecated
        again = torch.jit.load(io.BytesIO(place.read_bytes()), _extra_files=files)
    inputs = list(inputs_of(module, 11).values())
    with torch.no_grad():
        assert torch.allclose(again(*inputs).float(), module(*inputs).float(), rtol=1e-5, atol=1e-5)
        if role != "generator:0":
            assert torch.allclose(again(inputs[0].float() / 255), module(*inputs), rtol=1e-5, atol=1e-5)
    assert json.loads(files["config.json"])["role"] == role


@pytest.mark.parametrize("role", ["final", "teacher", "generator:0"])
def test_onnx_runtime_answers_alike(role, run, tmp_path, monkeypatch):
    onnx, *_, runtime = (pytest.importorskip(package) for package in ONNX)
    monkeypatch.setattr(meta_model, "MAX_NUMBERS", 5 * 48)  # a teacher takes more images than fit into one part
    place, module = exported(run, tmp_path, "--to", "onnx", "--role", role), run.model(role)
    session, inputs = runtime.InferenceSession(str(place)), inputs_of(module, 11)
    [found] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        wanted = module(*inputs.values()).numpy()
    if role == "generator:0":
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    else:
        assert np.abs(found - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())
    assert [entry.name for entry in session.get_inputs()] == list(inputs)
    [kept] = [entry.value for entry in onnx.load(place).metadata_props if entry.key == "mosaic_ray"]
    assert json.loads(kept)["role"] == role


def test_condensed_images_are_drawn_by_onnx_runtime_and_torchscript(tmp_path, monkeypatch):
    _, *_, runtime = (pytest.importorskip(package) for package in ONNX)
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    knobs = {"generator.family": "condensed", "generator.steps": 2, "generator.least_images": 1}
    made = runner.run(override(TINY, knobs), storage=str(tmp_path / "store"), progress=False)
    run = load_run(made["paths"]["run"])
    module, place = run.model("generator:0"), exported(run, tmp_path, "--to", "onnx", "--role", "generator:0")
    inputs = inputs_of(module, 11)
    wanted = module(*inputs.values()).numpy()
    [found] = runtime.InferenceSession(str(place)).run(None, {name: x.numpy() for name, x in inputs.items()})
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1 and wanted.std() > 10
    place.unlink()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.jit is deprecated
        again = torch.jit.load(exported(run, tmp_path, "--to", "torchscript", "--role", "generator:0"))
    assert np.abs(again(*inputs.values()).numpy().astype(int) - wanted.astype(int)).max() <= 1


@pytest.mark.parametrize("to", ["onnx", "torchscript", "hub"])
def test_a_file_that_answers_otherwise_is_not_written(to, run, tmp_path, monkeypatch):
    if to == "onnx":
        [pytest.importorskip(package) for package in ONNX]
    other = run.model("initial")
    real = model_files._compare
    monkeypatch.setattr(model_files, "_compare", lambda what, module, answer: real(what, other, answer))
    with pytest.raises(RunError, match="answers otherwise than the model"):
        run.export(to, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_has_data_accuracies_configuration_and_citation(run, tmp_path):
    place = exported(run, tmp_path, "--to", "hub")
    text = (place / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "mosaic_ray" and head["pipeline_tag"] == "image-classification"
    for role, value in run.summary.accuracy.items():
        if value is not None:
            bold = "**" if role == "final" else ""
            name, reached = (re.escape(f"{bold}{words}{bold}") for words in (role, f"{100 * value:.1f} %"))
            assert re.search(rf"\| {name} \| .* \| {reached} \|", text)
    for part in ("240 training images", "3 clients", "omega 0.3", '"partition.omega" = 0.3', "liu2025mosaic",
                 "No license is given", f"Final minus control: {100 * run.gain:+.1f}".replace("-", "−"),
                 r"\<b\>\*middle\*, a\|b"):  # fmt: skip
        assert part in text, part
    written = "".join(path.read_text(errors="replace") for path in place.iterdir())
    assert "/home/somebody" not in written and str(run.folder) not in written


def test_the_card_of_a_client_has_its_own_accuracy(run, tmp_path):
    text = (exported(run, tmp_path, "--to", "hub", "--role", "client:1") / "README.md").read_text()
    own = run.summary.client_accuracy.clients["own"][1]
    assert f"on its own mix of classes: **{100 * own:.1f} %**" in text


def test_the_snippet_of_the_card_runs(run, tmp_path, monkeypatch):
    fake = types.SimpleNamespace(snapshot_download=lambda name: tmp_path / name.lower().split("/")[1])
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for role in ("final", "generator:0"):
        place = run.export("hub", role, tmp_path / "name", force=True)
        code = (place / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names = {"images": IMAGES}
        exec(compile(code, "README.md", "exec"), names)
        assert len(names["images" if role == "generator:0" else "logits"]) == (16 if role == "generator:0" else 60)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["pt", "hub"])
def test_nothing_is_replaced_unless_asked(to, run, tmp_path):
    place = exported(run, tmp_path, "--to", to, "--role", "initial")
    words = ("export", str(run.folder), "--to", to, "--output", str(place))
    assert "--force replaces it" in refusal(ask(*words))
    assert load_model(place).config["role"] == "initial"
    assert ask(*words, "--force").exit_code == 0
    assert load_model(place).config["role"] == "final"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_replaced(run, tmp_path):
    (tmp_path / "thesis.tex").touch()
    for to in ("hub", "pt"):
        line = refusal(ask("export", str(run.folder), "--to", to, "--output", str(tmp_path), "--force"))
        assert str(tmp_path) in line
    assert (tmp_path / "thesis.tex").exists()


def test_an_export_that_fails_leaves_the_old_one(run, tmp_path, monkeypatch):
    place = run.export("hub", "initial", tmp_path / "out")
    monkeypatch.setattr(model_files, "load_model", lambda path, own_code: 1 / 0)
    with pytest.raises(RunError, match="cannot be written so"):
        run.export("hub", "final", place, force=True)
    assert load_model(place).config["role"] == "initial"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_default_place_is_in_the_runs_folder(run):
    result = ask("export", str(run.folder), "--role", "client:2")
    assert result.stdout == f"{run.folder / 'models' / 'client-2.pt'}\n"
    assert load_run(run.folder).status == "done"


@pytest.mark.parametrize(
    "words, says",
    [
        (("--role", "ceiling"), "ceiling: this run has initial, teacher, distilled, final, control, client:0 to 2"),
        (("--role", "client:7"), "role client:7: this run has"),
        (("--role", "generator:"), "generator:NUMBER"),
        (("--to", "onxx"), 'did you mean "onnx"'),
        (("--to", "pt", "--role", "teacher"), "take onnx or torchscript"),
        (("--push", "me/mine"), "it goes with --to hub"),
        (("--to", "hub", "--push", "mine"), "it takes OWNER/NAME"),
        (("--output", ""), "it is empty"),
        (("--output", "/dev/null/x"), "--output /dev/null/x"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(words, says, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    assert says in refusal(ask("export", str(run.folder), *words))


@pytest.mark.parametrize("words", [("--to", "onnx"), ("--to", "hub", "--push", "me/mine")])
def test_packages_that_are_not_installed_are_named_with_their_extra(words, run, monkeypatch):
    for package in (*ONNX, "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    line = refusal(ask("export", str(run.folder), *words))
    assert f'pip install "mosaic-ray[{"hf" if "--push" in words else "onnx"}]"' in line
    assert not (run.folder / "models" / "final.onnx").exists()


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for ``huggingface_hub``: records what would be sent."""

    def __init__(self, error: str = "") -> None:
        self.calls, self.error = [], error

    def HfApi(self):
        return self

    def create_repo(self, name, **how):
        self.calls.append(("create", name, how["private"], how["exist_ok"]))
        if self.error:
            raise ConnectionError(self.error)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_a_model_is_pushed_only_when_asked(run, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    words = ("export", str(run.folder), "--to", "hub", "--output", str(tmp_path / "out"))
    assert ask(*words).exit_code == 0
    assert hub.calls == []
    result = ask(*words, "--force", "--push", "me/mine")
    assert result.stdout.splitlines() == [str(tmp_path / "out"), "https://huggingface.co/me/mine"]
    files = ["README.md", "config.json", "model.safetensors"]
    assert hub.calls == [("create", "me/mine", True, True), ("upload", "me/mine", files)]


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub("401 Unauthorized\nlong story"))
    result = ask("export", str(run.folder), "--to", "hub", "--output", str(tmp_path / "out"), "--push", "me/mine")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "401 Unauthorized; the folder is" in result.stderr
    assert load_model(tmp_path / "out").config["role"] == "final"


# --- files of others -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/mosaic-models-evil"),))


def test_what_is_read_runs_no_code(run, tmp_path):
    place = run.export("hub", output=tmp_path / "hub")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"config": Evil(), "state_dict": {}}, tmp_path / "evil2.pt")
    for file in ("evil.pt", "evil2.pt", "nowhere", "hub/README.md"):
        assert str(tmp_path / file) in refused_by(load_model, tmp_path / file)
    assert not Path("/tmp/mosaic-models-evil").exists()
    config = json.loads((place / "config.json").read_text())
    for wrong in (
        {"network": "os:system"}, {"network": "cnn", "width": 8}, {"pipeline_tag": models.GENERATES},
        {"data": {}}, {"scale": "x"}, {"network": ["cnn"]}, {"width": 10**6},
    ):  # fmt: skip
        (place / "config.json").write_text(json.dumps(config | wrong))
        assert str(place) in refused_by(load_model, place)


def test_a_network_of_ones_own_is_imported_only_when_asked(tmp_path, monkeypatch):
    (tmp_path / "my_nets_of_exports.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    plain = {"method": "fedavg", "warmup.num_rounds": 1, "finetune.num_rounds": 1}
    config = override(TINY, plain | {"model.classifier": "my_nets_of_exports:build"})
    run = load_run(runner.run(config, storage=str(tmp_path / "s"), progress=False)["paths"]["run"])
    place = run.export("hub", output=tmp_path / "out")
    assert "my_nets_of_exports:build, code that would run here" in refused_by(load_model, place)
    assert torch.equal(load_model(place, own_code=True)(IMAGES), run.model()(IMAGES))
    assert "own_code=True" in (place / "README.md").read_text()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_runs(run, tmp_path, monkeypatch):
    shutil.copytree(run.folder.parents[1], tmp_path / "mosaic_runs")
    (tmp_path / "mosaic_runs" / "runs" / run.name).rename(tmp_path / "mosaic_runs" / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / "export.md"
    code = next(block.text for block in blocks(page, "python"))
    names = {"images": IMAGES}
    exec(compile(code.replace("=3)", "=2)"), "export.md", "exec"), names)  # this run has three clients
    assert names["logits"].shape == (60, 3) and names["drawn"].shape == (16, 1, 8, 8)
    asked = commands(page)
    assert {words[words.index("--to") + 1] if "--to" in words else "pt" for words in asked} == set(model_files.FORMATS)
    for words in asked:
        if "onnx" not in words:
            result = ask(*words)
            assert result.exit_code == 0 and Path(result.stdout.strip()).exists(), result.stderr
