"""Say that a process of Ray died which a driver needs. Run as a script, in a process of its own, by ``ray_session``.

Ray ends a driver without its raylet in the middle of a call, so the driver itself may have no time to say why.

Arguments: the end of the line to say, then NAME:PID of each process (Linux has descriptors of these). The driver holds
the other end of standard input: a byte is its goodbye, an end without one is its death. A byte on standard output tells
a driver that lives on.
"""

import contextlib
import os
import select
import sys


def main(advice: str, *processes: str) -> None:
    """Wait until the driver ends, or a process before it; then say so once the driver has ended, too."""
    names, ends = {}, select.poll()
    for name, pid in (process.rsplit(":", 1) for process in processes):
        names[os.pidfd_open(int(pid))] = name
    for descriptor in (0, *names):
        ends.register(descriptor, select.POLLIN)
    died = [names[descriptor] for descriptor, _ in ends.poll() if descriptor]
    if not died:
        return
    with contextlib.suppress(OSError):
        os.write(1, b".")
    if not os.read(0, 1):
        os.write(2, f"mosaic: error: Ray's {died[0]} on this machine died{advice}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
