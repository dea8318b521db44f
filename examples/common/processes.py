"""Several processes of one program on this machine: they start together and end together."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

#: How a launcher that JAX does not know by itself, such as ours, tells a process its place.
ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX reads this one itself
PLACE = COUNT, NUMBER = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_tried = itertools.count(os.getpid() * 7)


def free_port() -> int:
    """A port that nothing listens on, below those that systems give to outgoing connections.

    One of those (what binding to port 0 gives) may be taken again before the first process listens
    on it, by anything on this machine that connects somewhere.
    """
    for number in itertools.islice(_tried, 10_000):
        port = 20_000 + number % 10_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("Something listens on every port from 20000 to 29999 of this machine.")


def environments(count: int, devices: int, base: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of `count` processes with `devices` CPU devices finds in its environment."""
    flags = [flag for flag in base.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    shared = {
        **base,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        ADDRESS: f"127.0.0.1:{free_port()}",
        COUNT: str(count),
    }
    return [shared | {NUMBER: str(number)} for number in range(count)]


def launch(program: str, arguments: Sequence[str], count: int, devices: int) -> int:
    """Starts the processes, and ends them all when one fails.

    Args:
        program: The script that each of them runs.
        arguments: Its command line.
        count: How many processes.
        devices: CPU devices of each.

    Returns:
        The exit status: 0 if that of each is.
    """
    places = environments(count, devices, os.environ)
    running = [subprocess.Popen([sys.executable, program, *arguments], env=e) for e in places]
    try:
        while (codes := {process.poll() for process in running}) <= {None, 0}:
            if codes == {0}:
                return 0
            time.sleep(0.1)
        return 1
    finally:
        for process in running:
            process.kill()
            process.wait()
