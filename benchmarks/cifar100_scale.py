"""Peak memory and time of `mosaic sweep --dataset cifar100 --clients 100`, on data of CIFAR-100's shape made here.

    python benchmarks/cifar100_scale.py [--samples 3] [--clients 100]

50,000 training and 10,000 test images of 3x32x32 in 100 classes, each class a pattern of its own in noise, are written
in torchvision's layout (``cifar-100-python/{train,test,meta}``; torchvision itself would miss the true files' MD5).
Clients, generators, experts and the size of a distillation batch are a full sweep's: model and schedule are
small, so the time says little about one.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

#: What the sweep must stay below (decimal gigabytes).
LIMIT_GB = 6.0

KNOBS = {
    "model.width": 8,
    "warmup.num_rounds": 2,
    "warmup.local_steps": 2,
    "generator.steps": 5,
    "generator.ngf": 8,
    "generator.ndf": 8,
    "prototypes.k": 3,
    "meta.updates": 20,
    "distill.steps": 10,
    "finetune.num_rounds": 1,
    "finetune.local_steps": 2,
}


def write_cifar100(root: Path, num_train: int = 50_000, num_test: int = 10_000, seed: int = 0) -> None:
    """Learnable images in torchvision's layout below ``root``; a class is an 8x8 pattern, four pixels a cell."""
    draws = np.random.default_rng(seed)
    patterns = np.kron(draws.integers(64, 192, (100, 3, 8, 8), np.uint8), np.ones((1, 1, 4, 4), np.uint8))
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", num_train), ("test", num_test)):
        fine = draws.permutation(np.arange(count) % 100)
        data = patterns[fine].reshape(count, 3072)
        data += draws.integers(0, 64, data.shape, np.uint8)
        batch = {
            "filenames": [f"{name}_{row:05d}.png" for row in range(count)],
            "batch_label": name,
            "fine_labels": fine.tolist(),
            "coarse_labels": (fine // 5).tolist(),
            "data": data,
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {
        "fine_label_names": [f"class {c}" for c in range(100)],
        "coarse_label_names": [f"group {c}" for c in range(20)],
    }
    (folder / "meta").write_bytes(pickle.dumps(names))


@click.command()
@click.option("--clients", default=100, show_default=True)
@click.option("--samples", default=3, show_default=True)
@click.option("--set", "sets", multiple=True, help="Passed on to the sweep.")
def main(clients: int, samples: int, sets: tuple[str, ...]) -> None:
    """Run the sweep, and exit with 1 where it fails or takes too much."""
    with tempfile.TemporaryDirectory(prefix="cifar100-") as folder:
        write_cifar100(Path(folder, "data"))
        knobs = [f"{name}={value}" for name, value in KNOBS.items()]
        command = [
            sys.executable, str(Path(__file__).with_name("memory.py")), sys.executable, "-m", "mosaic_ray", "sweep",
            "--dataset", "cifar100", "--clients", str(clients), "--samples", str(samples),
            "--storage", f"{folder}/runs",
            *(word for knob in (f"data.root={folder}/data", *knobs, *sets) for word in ("--set", knob)),
        ]  # fmt: skip
        began, peak = time.perf_counter(), 0.0
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                sys.stderr.write(line)
                found = re.match(r"peak proportional set size: ([\d.]+) GiB", line)
                peak = float(found[1]) * 2**30 / 1e9 if found else peak
    click.echo(f"{time.perf_counter() - began:.0f} s, peak {peak:.2f} GB of {LIMIT_GB:g} GB")
    sys.exit(process.returncode or peak >= LIMIT_GB)


if __name__ == "__main__":
    main()
