"""clusters/slurm.sh: `ray symmetric-run` for real, on one node and on two; only `srun` is pretended.

Ray ends every Ray process that it sees when it stops, so the nodes are machines made of namespaces.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from netns import lan, missing
from test_readme import mosaic_words, parse

from mosaic_ray.sweeps.results import read_results

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "clusters" / "slurm.sh"

SPACE = """
from mosaic_ray.spaces import SweepPlan

def plan():
    points = ({"finetune.lr": lr} for lr in (0.001, 0.003))
    return SweepPlan("tiny", points=tuple(points), base={
        "method": "fedavg", "partition.num_clients": 2, "model.width": 4, "warmup.num_rounds": 1,
        "warmup.local_steps": 2, "finetune.num_rounds": 1, "finetune.local_steps": 2, "runtime.precision": "fp32",
    })
"""

#: The program runs on all nodes at once: here, and on the second by the file ``task``.
SRUN = r"""#!/bin/bash
[ "$1 $2" = "--nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1" ] || exit 64
while [[ $1 == --* ]]; do shift; done
{ export -p; echo 'export SLURM_PROCID=1'; printf ' %q' exec "$@"; echo; } > next && mv next task
SLURM_PROCID=0 exec "$@"
"""

SECOND = "until [ -e task ]; do sleep 0.2; done; . ./task"


def test_it_is_shell_and_its_options_for_slurm_come_before_its_commands():
    checked = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = SCRIPT.read_text()
    inner = re.search(r"bash -c '\n(.*)\n' node", text, re.DOTALL)[1].replace(r"'\''", "'")  # each node's part
    assert subprocess.run(["bash", "-n"], input=inner, text=True).returncode == 0
    before, _, after = text.partition("\nset -euo pipefail\n")
    assert {"nodes", "ntasks-per-node", "exclusive"} <= set(re.findall(r"^#SBATCH --([\w-]+)", before, re.MULTILINE))
    assert "#SBATCH" not in after


@pytest.mark.parametrize("place", ["clusters/slurm.sh", "docs/CLUSTER.md"])
def test_the_sweeps_that_are_shown_are_commands_of_ours(place):
    line = re.compile(r"^#?\s*sbatch (?:-\S+ )*clusters/slurm.sh (.*?)(?:  .*)?$", re.MULTILINE)
    shown = line.findall((REPO / place).read_text())
    assert shown
    for words in shown:
        assert parse(mosaic_words(f"mosaic sweep --address HEAD:6379 {words}")).info_name == "sweep"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("count", [1, 2])
def test_a_sweep_runs_on_all_nodes_of_an_allocation(tmp_path, count):
    if reason := missing(ssh=False):
        pytest.skip(reason)
    with lan(tmp_path / "lan", *(f"node{i}" for i in range(count)), ssh=False) as made:
        shared = tmp_path / "lan" / "shared"
        (shared / "bin").mkdir(parents=True)
        (shared / "bin" / "srun").write_text(SRUN)
        (shared / "bin" / "srun").chmod(0o755)
        (shared / "tiny.py").write_text(SPACE)
        first, *others = made.machines
        path = first.run("printenv", "PATH").stdout.strip()
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(count)}
        slurm |= {"SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "5120"}
        env = {"HOME": str(shared), "PATH": f"{shared / 'bin'}:{path}", **slurm}
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(node.run, "bash", "-c", SECOND, cwd=shared) for node in others]
            done = first.run("bash", str(SCRIPT), "--space", f"{shared}/tiny.py", "--name", "tiny", cwd=shared, env=env)
            assert done.returncode == 0, done.stdout + done.stderr
            for other in waiting:
                assert other.result().returncode == 0, other.result().stdout + other.result().stderr
                assert "On worker node" in other.result().stdout
        for node in made.machines:
            assert node.run("ls", "/tmp/mosaic-7").returncode != 0, "files of Ray stay behind"
            assert not [process for process in node.processes() if "raylet" in process.name()]
    # as it stops, Ray shows the options of its processes
    shares = re.search(r",CPU,2,memory,(\d+),object_store_memory,(\d+)", done.stdout)
    assert sum(map(int, shares.groups())) == 5 * 2**30
    table = read_results(shared / "mosaic_runs" / "sweeps" / "tiny" / "results.parquet")
    assert table.column("status").to_pylist() == ["done", "done"]
