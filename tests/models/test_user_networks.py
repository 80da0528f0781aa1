"""Networks of users (model.classifier = module:function): how they are built, and errors for bad ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import ask, refusal
from helpers import FACTS, TINY, assert_same, small_ray, stripes_dataset
from torch import nn

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ModelConfig
from mosaic_ray.config.user_code import digest_of
from mosaic_ray.core.errors import RequestError
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import ROLES
from mosaic_ray.execution.placement import Placement
from mosaic_ray.models.classifiers import Classifier, build_classifier
from mosaic_ray.models.discriminator import SharedTrunkDiscriminator
from mosaic_ray.models.state_dict import head_of, to_weights
from mosaic_ray.runs import runner
from mosaic_ray.runs.checks import check_models
from mosaic_ray.storage.store import Store

HEAD = "import torch\nfrom torch import nn\n"

#: A network as a user writes it; its last linear layer is registered first, and a dropout makes the modes differ.
NET = (
    HEAD
    + """

class Net(nn.Module):
    def __init__(self, num_classes, channels, width):
        super().__init__()
        self.classes = nn.Linear(2 * width, num_classes)
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.classes(self.drop(self.hidden(x).relu()))


def build(num_classes, channels, image_size, width):
    print("building")
    return Net(num_classes, channels, width)
"""
)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Writes a module, of a new name each time, into a working directory that Python does not import from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])

    def write(source: str) -> str:
        name = f"lab_{abs(hash((str(tmp_path), source)))}"  # imports are remembered
        (tmp_path / f"{name}.py").write_text(source)
        return f"{name}:build"

    return write


def sequential(*layers: str) -> str:
    """Source of a module with a ``build`` that chains these layers."""
    return (
        HEAD + f"def build(num_classes, channels, image_size, width):\n    return nn.Sequential({', '.join(layers)})\n"
    )


CONV = (
    "nn.Conv2d(channels, width, 3)",
    "nn.BatchNorm2d(width)",
    "nn.ReLU()",
    "nn.AdaptiveAvgPool2d(1)",
    "nn.Flatten()",
)


#: One layer that is registered twice.
TWO_NAMES = (
    HEAD
    + """
class build(nn.Module):
    def __init__(self, num_classes, **more):
        super().__init__()
        self.last = nn.Linear(64, num_classes)
        self.whole = nn.Sequential(nn.Flatten(), self.last)

    def forward(self, x):
        return self.whole(x)
"""
)

#: Layers that start at zero, so that all give the same.
ZEROED = (
    HEAD
    + """
def build(num_classes, **more):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.Linear(num_classes, num_classes))
    for value in net.parameters():
        nn.init.zeros_(value)
    return net
"""
)


def built(name: str, size: int = 8, channels: int = 1) -> Classifier:
    with seeded(0, "init", "classifier"):
        return build_classifier(ModelConfig(name, width=4), 3, channels, size)


def images(size: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 28), (3, 6)])
def test_a_users_network_is_a_trunk_and_a_head(lab, channels, size, capsys):
    word = lab(NET)
    state = torch.get_rng_state()
    net = built(word, size, channels).eval()
    assert torch.equal(state, torch.get_rng_state())
    theirs = sys.modules[word.partition(":")[0]]
    with seeded(0, "init", "classifier"):
        alone = theirs.build(3, channels, size, 4).eval()  # the same draws make the same network
    x = images(size, channels)
    torch.testing.assert_close(net(x), alone(x), rtol=0, atol=0)
    features = net.features(x)
    assert features.shape == (5, net.feature_dim) == (5, 8) and type(net.head) is nn.Linear
    torch.testing.assert_close(net.head(features), net(x), rtol=0, atol=0)
    weights = to_weights(net)
    assert [v.shape for v in head_of(weights)] == [(3, 8), (3,)]
    assert {n for n in weights if n.startswith("head.")} == {"head.weight", "head.bias"}
    assert {n.partition(".")[0] for n in weights} == {"trunk", "head"} and len(weights) == len(alone.state_dict())
    assert SharedTrunkDiscriminator(net)(x).shape == (5,)
    assert net.train()(x).shape == (5, 3) and not torch.equal(net(x), net(x))  # its dropout is at work
    assert capsys.readouterr().out == "building\n"  # this test's own call: otherwise standard output is for results
    assert sys.path.count(str(Path.cwd())) == 0


@pytest.mark.parametrize(
    "source, feature_dim",
    [
        (sequential("nn.Flatten()", "nn.Linear(channels * image_size**2, num_classes)"), 64),
        (sequential(*CONV, "nn.Linear(width, num_classes)"), 4),
        (sequential("nn.Sequential(*[nn.Flatten(), nn.Linear(64, 3)])", "nn.ReLU()", "nn.Linear(3, num_classes)"), 3),
        (TWO_NAMES, 64),
        (ZEROED, 3),
        (HEAD + "class build(nn.Sequential):\n    def __init__(self, num_classes, **more):\n"
         "        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))\n", 64),
    ],
)  # fmt: skip
def test_networks_of_many_kinds(lab, source, feature_dim):
    net = built(lab(source)).eval()
    x = images()
    assert net.features(x).shape == (5, feature_dim) == (5, net.feature_dim)
    torch.testing.assert_close(net.head(net.features(x)), net(x))
    assert sum(n.startswith("head.") for n in to_weights(net)) == 2


def test_looking_for_the_head_draws_nothing(lab):
    """Only the first build of a process looks for it."""
    word, draws = lab(NET), []
    for _ in range(2):
        with seeded(0, "init", "classifier"):
            build_classifier(ModelConfig(word, width=4), 3, 1, 8)
            draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_the_function_of_a_package_and_a_changed_file(lab, tmp_path):
    (tmp_path / "my_test_lab").mkdir()
    (tmp_path / "my_test_lab" / "nets.py").write_text("from .parts import Net, build\n")
    (tmp_path / "my_test_lab" / "parts.py").write_text(NET)
    word = "my_test_lab.nets:build"
    check_models(override(TINY, {"model.classifiers": ("cnn", word)}), FACTS)
    digest = digest_of(word)
    assert len(digest) == 20 and digest == digest_of("my_test_lab.nets:other") and digest_of("cnn") == ""
    assert digest != digest_of("my_test_lab.parts:build")
    (tmp_path / "my_test_lab" / "nets.py").write_text("from .parts import Net, build  # other\n")
    assert digest_of(word) != digest
    with pytest.raises(RequestError, match=r"^model.classifier = my_test_lab:build: my_test_lab is no file"):
        digest_of("my_test_lab:build", "model.classifier = my_test_lab:build")


ASKED = "def build(num_classes, channels, image_size, width):\n"


@pytest.mark.parametrize(
    "source, says",
    [
        ("def biuld():\n    pass\n", 'no function build() there; did you mean "biuld"?'),
        ("import no_such_thing\n", "{file}, line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("x = 1\ndef build(:\n", "{file}, line 2: SyntaxError: invalid syntax"),
        (ASKED + "    x = 1\n    raise ValueError('two\\nlines')\n", "{file}, line 3: ValueError: two lines"),
        ("def build(classes):\n    pass\n", "TypeError: build() got an unexpected keyword argument 'num_classes'"),
        (ASKED + "    return 3\n", "build() returned int, not a torch.nn.Module"),
        (HEAD + ASKED + "    return nn.Linear\n", "build() returned type, not a torch.nn.Module"),
        (sequential("nn.Flatten()", "nn.Linear(64, 5)"), "images [2, 1, 8, 8] give [2, 5], not logits [2, 3]"),
        (sequential("nn.Linear(8, 3)"), "images [2, 1, 8, 8] give [2, 1, 8, 3], not logits [2, 3]"),
        (sequential("nn.Flatten()", "nn.Linear(64, 3)", "nn.LogSoftmax(1)"),
         "its last step is not an nn.Linear to 3 classes; end it with one, without a softmax"),
        (sequential("nn.Conv2d(1, 3, 8)", "nn.Flatten()"), "its last step is not an nn.Linear to 3 classes"),
        (sequential("nn.Flatten()", "nn.Linear(64, 3, bias=False)"), "its last nn.Linear needs a plain weight "),
        (sequential("nn.Flatten()", "nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))"),
         "its last nn.Linear needs a plain weight and a bias"),
        (sequential("nn.Flatten()", "nn.LazyLinear(3)"), "it has lazy layers; give them their sizes"),
        (sequential("nn.Conv2d(3, 4, 3)", "nn.Flatten()"), "RuntimeError: Given groups=1, weight of size [4, 3, "),
        (NET.replace("x = self.norm", "x = self.oops; x = self.norm"), "{file}, line 15: AttributeError: 'Net' object"),
        (NET.replace("self.hidden(x)", "x"), "{file}, line 16: RuntimeError: "),
        (NET.replace("return self.classes", "return {}, self.classes"), "images [2, 1, 8, 8] give a tuple, not"),
        (NET.replace("return self", "return (0, 1) if self.training else self"), "images [2, 1, 8, 8] give a tu"),
        (NET.replace("mean((2, 3))", "mean((2, 3)) * self.classes(torch.ones(len(x), 8)).sum()"),
         "its last nn.Linear is at work elsewhere in it too"),
        (NET.replace("x = self.norm", "self.classes.in_features; x = self.norm"),
         "{file}, line 15: AttributeError: 'Identity' object has no attribute 'in_features'"),
        (sequential("nn.Conv2d(1, 4, 8)", "nn.Flatten()", "nn.Linear(4, 3)"),
         "it has no batch norm, and the generators' inversion loss reads its statistics; give it one, or set gene"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_used_is_refused_in_one_line(lab, source, says, capsys):
    word = lab(source)
    file = Path.cwd() / f"{word.partition(':')[0]}.py"
    state = torch.get_rng_state()
    with pytest.raises(RequestError) as caught:
        check_models(override(TINY, {"model.classifiers": ("cnn", word)}), FACTS)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.classifier = {word}: {says.replace('{file}', str(file))}")
    assert capsys.readouterr().out == "" and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("knobs", [{"method": "fedavg"}, {"generator.lambda_i": 0.0}, {"generator.tau": 0}])
def test_batch_norm_is_asked_for_where_it_is_read(lab, knobs):
    word = lab(sequential("nn.Flatten()", "nn.Linear(64, num_classes)"))
    check_models(override(TINY, {"model.classifier": word} | knobs), FACTS)


@pytest.mark.parametrize(
    "word, says",
    [
        ("no_such_lab.x:build", 'no module "no_such_lab" on Python\'s path or in the working directory'),
        ("..:build", "it takes a name, module:function or FILE.py:function"),
        ("json:build", "no function build() there; it may be detect_encoding, dump, dumps, load, loads"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["sweep", "--space", "smoke"]])
def test_a_wrong_name_ends_the_command_before_anything_starts(two_cpus, command, word, says):
    result = ask(*command, "--dataset", "digits", "--set", f"model.classifier={word}", "--storage", "s")
    assert refusal(result) == f"mosaic: error: model.classifier = {word}: {says}\n"
    assert not list(Path("s").glob("runs/*"))


# --- whole runs ------------------------------------------------------------------------------------------------------


def go(storage: Path, word: str, **knobs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tiny experiment with the network of ``word``: its summary, and the student's weights."""
    from safetensors.numpy import load_file

    config = override(TINY, {"model.classifier": word} | {name.replace("__", "."): v for name, v in knobs.items()})
    summary = runner.execute(config, stripes_dataset(), Store(str(storage)), "runs/r", Placement(), progress=False)
    return summary, load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def test_a_whole_run_with_a_users_network(lab, tmp_path):
    summary, student = go(tmp_path, lab(NET))
    assert set(summary["accuracy"]) == set(ROLES)
    assert student["head.weight"].shape == (3, 8) and "trunk.conv.weight" in student


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_client_actors_find_the_users_network_and_end_with_the_same_bits(lab, tmp_path):
    """The module lies in the directory that the command was started in, and Python's path does not have it."""
    word, knobs = lab(NET), {"method": "fedavg", "warmup__num_rounds": 1, "finetune__num_rounds": 1}
    _, serial = go(tmp_path / "serial", word, **knobs)
    with small_ray(num_cpus=2):
        _, on_ray = go(tmp_path / "ray", word, runtime__host="ray", runtime__max_hosts=1, **knobs)
    assert_same(on_ray, serial)
