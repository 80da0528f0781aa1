"""The machines for tests of a real `ray up`: they share the right things, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from netns import HOME, REPO, lan, missing

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def possible() -> None:
    if reason := missing():
        pytest.skip(reason)


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def test_they_reach_one_another_by_ssh_and_outlast_a_power_cut(tmp_path):
    before = links()
    with lan(tmp_path / "lan", "one", "two") as made:
        one, two = made.machines
        ssh = ["ssh", "-i", str(HOME / ".ssh/id_ed25519"), "-o", "StrictHostKeyChecking=no", "-o", "BatchMode=yes"]
        for _ in range(2):
            answer = one.run(*ssh, two.address, "hostname; touch /tmp/here ~/here")
            assert answer.stdout.strip() == "two", answer.stderr
            assert one.run("test", "-e", "/tmp/here").returncode == 1, "they share /tmp"
            assert one.run("test", "-e", str(HOME / "here")).returncode == 1, "they share a home"
            assert two.run("test", "-e", str(HOME / "here")).returncode == 0
            assert one.run(sys.executable, "-c", "import ray", cwd=REPO).returncode == 0
            pids = [two.pid, *(process.pid for process in two.processes())]
            two.cut()
            assert not any(map(psutil.pid_exists, pids))
            made.connect(two)
        pids = [machine.pid for machine in made.machines]
        assert links() == before
    assert not any(map(psutil.pid_exists, pids))


def test_they_end_with_the_process_that_started_them(tmp_path):
    code = (
        "import sys; from pathlib import Path; from netns import lan\n"
        "with lan(Path(sys.argv[1]), 'one', 'two') as made:\n"
        "    print(*(machine.pid for machine in made.machines), flush=True)\n"
        "    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lan")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    ) as process:  # fmt: skip
        inits = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(inits) == 2
        process.kill()
    _, alive = psutil.wait_procs(inits, timeout=30)
    assert not alive
