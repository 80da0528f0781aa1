"""Wrong requests, and words of the one line that answers each: ``(arguments, words)``, with exit status 2.

``FILES`` lie in the working folder.
"""

from __future__ import annotations

import pytest

FILES = {
    "nested.toml": "a = " + "[" * 5000,
    "long.toml": "seed = " + "9" * 5000,
    "quoted.toml": '[warmup]\nnum_rounds = "3"\n',
    "huge.toml": "[warmup]\nnum_rounds = 1e26\n",
    "hex.toml": f"[warmup]\nnum_rounds = 0x{'f' * 8000}\n",
    "large.toml": "# " + "x" * 1_100_000,
    "plain_net.py": (
        "from torch import nn\n"
        "def build(num_classes, channels, image_size, width):\n"
        "    layers = nn.Conv2d(channels, 4, image_size), nn.Flatten(), nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    ),
}

DRY = ["run", "--dry-run"]


def dry(*knobs: str) -> list[str]:
    """Return a dry run with ``knobs``."""
    return [*DRY, *(word for knob in knobs for word in ("--set", knob))]


#: Options.
OPTIONS = [
    ([*DRY, "--storage", ""], ["--storage ''", "empty"]),
    (["store", "ls", "--storage="], ["--storage ''", "empty"]),
    ([*DRY, "--config", ""], ["--config ''", "empty"]),
    ([*DRY, "--preset="], ["--preset ''", "empty"]),
    ([*DRY, "--name", ""], ["--name"]),
    ([*DRY, "--name", "a\nb"], [r"--name a\nb", "control character"]),
    ([*DRY, "--name", "a\x1b[31mb"], [r"--name a\x1b[31mb", "control character"]),
    ([*DRY, "--name", "a\u202eb"], [r"--name a\u202eb", "control character"]),
    (["sweep", "--dry-run", "--name", "a\tb"], [r"--name a\tb", "control character"]),
    ([*DRY, "--host", "serial", "--address", "10.0.0.1:6379"], ["--address 10.0.0.1:6379", "runtime.host = serial"]),
    (
        ["experiment", "moe-weights", "--host", "serial", "--address", "auto"],
        ["--address auto", "runtime.host = serial"],
    ),
    (["data", "clean", "--older-than", "soon"], ["--older-than soon", "12h"]),
    (["rn\x1b[2J"], [r"rn\x1b[2J"]),
]

#: Knobs.
KNOBS = [
    ([*DRY, "--set", "warmup.num_rounds=1e26"], ["warmup.num_rounds = 1e26", "no larger than 1e+09"]),
    ([*DRY, "--set", "warmup.lr=1e26"], ["warmup.lr = 1e26", "no larger than 1e+09"]),
    ([*DRY, "--set", "warmup.lr=inf"], ["warmup.lr = inf", "a number"]),
    ([*DRY, "--set", "warmup.lr=nan"], ["warmup.lr = nan", "a number"]),
    ([*DRY, "--set", "warmup.lr=-0"], ["warmup.lr = -0", "above 0"]),
    ([*DRY, "--set", "federation.widths=" + "[" * 5000], ["federation.widths = [", "a list of numbers"]),
    ([*DRY, "--set", "generator.latent_dim=100000000"], ["generator.latent_dim = 100000000", "at most 1e+06"]),
    ([*DRY, "--config", "nested.toml"], ["--config nested.toml", "nested too deeply"]),
    ([*DRY, "--config", "long.toml"], ["--config long.toml", "digits"]),
    ([*DRY, "--config", "large.toml"], ["--config large.toml", "larger than"]),
    ([*DRY, "--config", "/dev/zero"], ["--config /dev/zero", "larger than"]),
    ([*DRY, "--config", "huge.toml"], ["warmup.num_rounds = 1e+26", "no larger than 1e+09"]),
    ([*DRY, "--config", "hex.toml"], ["warmup.num_rounds = a huge value", "no larger than 1e+09"]),
    ([*DRY, "--config", "quoted.toml"], ['warmup.num_rounds = "3"', "a whole number"]),
]

#: Memory: more than any machine that runs tests has.
MEMORY = [
    (
        [*DRY, "--set", "generator.latent_dim=1000000", "--set", "generator.ngf=4096"],
        ["generator.latent_dim = 1000000", "generator.ngf = 4096", "GiB of memory at least"],
    ),
    (
        [*DRY, "--set", "generator.batch_size=1000000", "--set", "generator.ngf=4096"],
        ["generator.batch_size = 1000000"],
    ),
    (
        [*DRY, "--algorithm", "distilled", "--set", "meta.token_dim=100000", "--set", "meta.feedforward=1000000"],
        ["meta.token_dim = 100000", "meta.feedforward = 1000000", "teacher would take"],
    ),
    (
        [*DRY, "--algorithm", "distilled", "--clients", "1000000", "--set", "distill.samples_per_generator=1000000"],
        ["partition.num_clients = 1000000"],
    ),
    (
        ["sweep", "--dry-run", "--grid", "generator.ngf=16,4096", "--set", "generator.latent_dim=1000000"],
        ["generator.ngf = 4096", "GiB of memory at least"],
    ),
    (
        [*DRY, "--set", "generator.family=condensed", "--set", "generator.images_per_class=100000", "--clients", "100",
         "--set", "generator.image_scale=1", "--dataset", "cifar100"],
        ["generator.images_per_class = 100000", "GiB of memory at least"],
    ),
    (
        [*DRY, "--set", "generator.family=condensed", "--set", "generator.image_scale=3"],
        ["generator.image_scale = 3", "8 pixels"],
    ),
]

#: By function with a refusal of its own, as ``FILE:FUNCTION``: requests that it refuses.
STAGES = {
    "methods/fedcvae.py:FedCvae.check": [
        ([*dry("generator.family=dcgan"), "--method", "fedcvae"], ["method fedcvae", "generator.family=cvae"])
    ],
    "methods/mosaic/method.py:_check_joint": [
        (
            [*dry("generator.family=dcgan"), "--dataset", "mfeat", "--algorithm", "distilled"],
            ["samples have several modalities", "cvae or cgan"],
        )
    ],
    "methods/mosaic/method.py:Mosaic.check": [
        (dry("rehearsal.candidates=[]", "rehearsal.weight=0"), ["distill.steps = 0"])
    ],
    "methods/mosaic/method.py:Mosaic.check_networks": [
        ([*dry("model.classifier=plain_net:build"), "--algorithm", "distilled"], ["it has no batch norm"])
    ],
    "methods/server_side.py:needs_rounds": [
        ([*dry("warmup.num_rounds=0"), "--method", "dense"], ["method dense", "above 0"]),
        ([*dry("warmup.num_rounds=0"), "--method", "fens"], ["method fens", "above 0"]),
    ],
    "methods/server_side.py:PoolMethod.check_networks": [
        ([*dry("model.classifier=plain_net:build"), "--method", "dense"], ["set dense.bn_weight=0"])
    ],
    "distillation/image_quality.py:inception_weights": [
        (["experiment", "generator-quality", "--inception"], ["--inception", "leave it out"])
    ],
    "distillation/experts.py:form_experts": [
        (
            [
                "run", "--algorithm", "distilled", "--clients", "4", "--set", "model.classifiers=cnn,mobilenet",
                "--set", "partition.sampler=pathological", "--set", "partition.classes_per_client=3",
                "--set", "meta.expert_fallback=error",
            ],
            ["meta.expert_fallback = error: no client holds class"],
        )
    ],
    "federated/strategies/base.py:Combined.__init__": [
        (dry("federation.strategy=fedprox+moon"), ["fedprox and moon cannot be combined"])
    ],
    "federated/strategies/fedlc.py:FedLC.check": [
        (dry("federation.strategy=fedlc", "warmup.loss=adjusted"), ["warmup.loss = adjusted", "fedlc"])
    ],
    "federated/strategies/fedrs.py:FedRS.check": [
        (dry("federation.strategy=fedrs", "warmup.loss=adjusted"), ["warmup.loss = adjusted", "fedrs"]),
        (dry("federation.strategy=fedrs", "federation.masked=true"), ["federation.masked = true"]),
    ],
    "federated/strategies/local.py:Local.check": [
        (dry("federation.strategy=local", "federation.cohort_size=2"), ["cohort_size = 2", "local"]),
        ([*dry("federation.strategy=local"), "--method", "fedftg"], ["method fedftg", "local has none"]),
    ],
    "federated/strategies/pmcmfl.py:Pmcmfl.check": [
        (dry("federation.strategy=pmcmfl"), ["model.fusion = late", "--set model.fusion=prototypes"]),
        (
            dry("federation.strategy=pmcmfl", "model.fusion=prototypes", "warmup.loss=adjusted"),
            ["warmup.loss = adjusted", "take ce, and false"],
        ),
    ],
    "federated/strategies/scaffold.py:Scaffold.check": [
        (dry("federation.strategy=scaffold", "warmup.momentum=0.9"), ["warmup.momentum = 0.9"]),
        (
            [*dry("federation.strategy=scaffold", "model.classifiers=cnn,mobilenet"), "--clients", "4"],
            ["model.classifiers", "scaffold needs one network"],
        ),
    ],
}  # fmt: skip

BAD = [
    pytest.param(*bad, id=" ".join(bad[0])[:80].encode("unicode_escape").decode()) for bad in OPTIONS + KNOBS + MEMORY
]
