"""Machines within this machine: Linux namespaces, joined by a bridge, with an sshd each where it is wanted.

A machine has its own network, processes, /tmp, /run, /dev/shm and home. It shares the rest of the disk, and so the
Python environment. Its first process ends when the pipe to it closes, and all else ends with this process. So no
process, namespace, link or mount stays behind, even if the tests are killed. The bridge lies in the namespace of the
first machine, so this machine's own network is never touched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]

#: The namespaces of a machine.
HOME = Path(pwd.getpwuid(0).pw_dir)
PRIVATE = (Path("/tmp"), HOME)

#: Debian's package of each tool.
TOOLS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "bash": "bash",
}

#: Of these, what machines without an sshd can do without.
SSH = ("openssh-client", "openssh-server", "rsync")

_PATH = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")

_SSHD = """
ListenAddress {address}
HostKey {keys}/host
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
SetEnv PYTHONPATH={repo}
"""


def missing(ssh: bool = True) -> str:
    """Return the reasons why machines (``ssh``: with an sshd) cannot be made, as text; empty if they can."""
    if sys.platform != "linux" or os.geteuid():
        return "needs root on Linux"
    absent = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=_PATH)})
    absent = absent if ssh else [package for package in absent if package not in SSH]
    if absent:
        return f"not installed: {', '.join(absent)}"
    probe = ["unshare", *_NAMESPACES, "--fork", "ip", "link", "add", "lan", "type", "bridge"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no namespaces or no bridge here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Machine:
    """A host. ``folder``: its /tmp and its home lie there and outlast a power cut; its parent every machine sees."""

    name: str
    number: int
    folder: Path
    ssh: bool = True
    _init: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def home(self) -> Path:
        """Its home, as seen from outside."""
        return self._own(HOME)

    def _own(self, place: Path) -> Path:
        return self.folder / "disk" / str(place)[1:]

    @property
    def pid(self) -> int:
        """Its first process."""
        assert self._init is not None, f"{self.name} is off"
        return psutil.Process(self._init.pid).children()[0].pid

    def processes(self) -> list[psutil.Process]:
        """All of its processes but the first; orphans are its children too."""
        return psutil.Process(self.pid).children(recursive=True)

    def inside(self, *words: str, only: Sequence[str] = _NAMESPACES) -> list[str]:
        """The command line that runs ``words`` there."""
        return ["nsenter", "--target", str(self.pid), *only, "--", *words]

    def run(
        self, *words: str, cwd: Path = HOME, timeout: float = 600, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``words`` there and wait for the end."""
        line = self.inside("bash", "-c", 'cd "$0" && exec "$@"', str(cwd), *words)
        environment = {"HOME": str(HOME), "PATH": _PATH, "PYTHONPATH": str(REPO), "LANG": "C.UTF-8", "TERM": "dumb"}
        return subprocess.run(
            line,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
            env=environment | (env or {}),
        )

    def boot(self) -> None:
        """Switch it on: its namespaces, its own folders and its sshd; no network yet."""
        lines = ["set -e", f"hostname {self.name}"]
        for place in PRIVATE:
            own = self._own(place)
            own.mkdir(parents=True, exist_ok=True)
            for path in (REPO, Path(sys.prefix), Path(sys.base_prefix), self.folder.parent):
                if path.is_relative_to(place):
                    inner = own / path.relative_to(place)
                    inner.mkdir(parents=True, exist_ok=True)
                    lines.append(shlex.join(["mount", "--bind", str(path), str(inner)]))
            lines.append(shlex.join(["mount", "--rbind", str(own), str(place)]))
        config = shlex.quote(str(self.folder / "sshd_config"))
        sshd = f"mkdir /run/sshd && {shutil.which('sshd', path=_PATH)} -f {config}"
        lines += [
            "mount -t tmpfs -o mode=755 tmpfs /run",
            "mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm",
            "ip link set lo up",
            "echo up",
            "read -r _",  # the network is there
            *([sshd] if self.ssh else []),
            "echo up",
            "read -r _",  # until the pipe closes
        ]
        self._own(Path("/tmp")).chmod(0o1777)
        with (self.folder / "boot.log").open("a") as log:
            self._init = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child", "bash", "-c", "\n".join(lines)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={"HOME": str(HOME), "PATH": _PATH},
            )  # fmt: skip
        self._await_up()

    def serve(self) -> None:
        """Start sshd, once the network is there."""
        print(file=self._init.stdin, flush=True)
        self._await_up()

    def _await_up(self) -> None:
        if self._init.stdout.readline() != "up\n":
            raise RuntimeError(f"{self.name} does not start: {(self.folder / 'boot.log').read_text()}")

    def cut(self) -> None:
        """A power cut: SIGKILL to its first process, with which the kernel ends every other."""
        if self._init is None:
            return
        with contextlib.suppress(IndexError, psutil.NoSuchProcess):  # it has ended already
            psutil.Process(self.pid).kill()
        self._init.stdin.close()
        self._init.stdout.close()
        self._init.wait()
        self._init = None


@dataclass(frozen=True)
class Lan:
    """Machines on one bridge, which the first of them holds."""

    machines: tuple[Machine, ...]

    def connect(self, machine: Machine) -> None:
        """Switch ``machine`` on, with its network and its sshd."""
        first = self.machines[0]
        machine.boot()
        in_first, in_machine = (shlex.join(m.inside("ip", only=("--net",))) for m in (first, machine))
        if machine is first:
            lines = ["{0} link add eth0 type bridge"]
        else:
            mac = f"02:00:00:00:00:{machine.number:02x}"  # the same after a power cut: neighbours remember it
            lines = [
                f"! {{1}} link show {machine.name} 2>/dev/null || {{1}} link delete {machine.name}",
                f"{{1}} link add {machine.name} type veth peer name eth0 address {mac} netns {machine.pid}",
                f"{{1}} link set {machine.name} master eth0 up",
            ]
        lines += [
            f"{{0}} address add {machine.address}/24 dev eth0",
            "{0} link set eth0 up",
            "{0} route add default dev eth0",  # Ray asks the kernel by which address it would reach the world
        ]
        script = "set -e\n" + "\n".join(lines).format(in_machine, in_first)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{machine.name} gets no network: {done.stderr}")
        machine.serve()


@contextlib.contextmanager
def lan(folder: Path, *names: str, ssh: bool = True) -> Iterator[Lan]:
    """Machines called ``names``, on. All see ``folder``.

    ``ssh``: each may log in to each as root, with ~/.ssh/id_ed25519.
    """
    keys = folder / "keys"
    keys.mkdir(mode=0o700, parents=True)
    for name in ("host", "user") if ssh else ():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    made = Lan(tuple(Machine(name, i + 1, folder / name, ssh) for i, name in enumerate(names)))
    try:
        for machine in made.machines:
            home = machine.home / ".ssh"
            home.mkdir(parents=True, mode=0o700)
            if ssh:
                shutil.copy(keys / "user", home / "id_ed25519")
                shutil.copy(keys / "user.pub", home / "authorized_keys")
                (machine.folder / "sshd_config").write_text(_SSHD.format(address=machine.address, keys=keys, repo=REPO))
            made.connect(machine)
        yield made
    finally:
        for machine in reversed(made.machines):
            machine.cut()
