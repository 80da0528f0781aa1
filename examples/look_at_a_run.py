"""Look at a run, cell by cell in a notebook, or all at once: ``python examples/look_at_a_run.py [PATH]``.

PATH is a run's folder, or a storage that holds one run. Without it a small run on bundled digits is made first, which
takes half a minute. Figures are saved below ``figures/`` in the working directory.
"""

# %% Where the run lies, and the run itself
import sys
from pathlib import Path

from mosaic_ray import load_run

PATH = sys.argv[1] if len(sys.argv) == 2 else "./mosaic_runs/example"
if not Path(PATH).exists():
    from mosaic_ray.config.resolve import resolve
    from mosaic_ray.runs import runner

    small = {
        "warmup.num_rounds": "6",
        "generator.steps": "60",
        "meta.updates": "100",
        "distill.steps": "50",
        "runtime.host": "serial",
        "distill.workers": "0",
    }
    runner.run(resolve("demo", sets=small), storage=PATH)

run = load_run(PATH)
print(run.name, run.status, run.config["data"]["name"], run.summary.accuracy)

# %% Metrics: a pandas frame [stage, tag, step, value]
print(run.metrics.groupby(["stage", "tag"])["value"].agg(["count", "last"]))

# %% One curve, as a series by round
print(run.curve("warmup/accuracy"))

# %% Images by client and class
print(run.label_counts)

# %% Arrays are read from the store on demand; NotAvailable gives the reason where one is missing
from mosaic_ray.report.load import NotAvailable  # noqa: E402 (a notebook imports where it needs)

print(run.confusion("final"))
try:
    print({client: images.shape for client, images in run.samples().items()})
except NotAvailable as absent:
    print(f"no samples: {absent}")

# %% The report's figures, as matplotlib's
folder = Path("figures")
folder.mkdir(exist_ok=True)
for name in ("stages", "rounds", "per_class", "confusion_final", "partition", "samples", "time"):
    try:
        figure = run.plot(name)
    except NotAvailable as absent:
        print(f"{name}: {absent}")
        continue
    figure.savefig(folder / f"{name}.png", dpi=150)
    print(folder / f"{name}.png")
