"""Processes of the multi-host example on this machine, one of which dies, and what they leave."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from common.processes import environments

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "train_multihost.py"
#: Long enough that a process is killed well before the end, and with a threshold that is reached.
STEPS, EVERY = 60, 20
OPTIONS = ("--layers", 1, "--width", 32, "--batch-size", 8)
OPTIONS += ("--steps", STEPS, "--checkpoint-every", EVERY)
#: A machine may be busy with other tests: what must end has this long, and takes seconds.
PATIENCE = 400

#: What a test machine may itself be part of, and would be found by `jax.distributed`.
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")

#: The program, but that each process keeps what it holds of a state when it is saved, and that the
#: last one kills itself after the first checkpoint. All wait until the checkpoint is there: what is
#: killed is the same on a busy machine and on an idle one.
KILLED = """
import os, pickle, signal, sys, time
from pathlib import Path
import jax
import numpy as np
import train_multihost as program

base, first, step, victim = Path({base!r}), Path({first!r}), {step}, {victim}
number = int(os.environ["JAX_PROCESS_ID"])
batch = program.ShardedTraining.batch

def held(self, now):
    if now == step:
        while not first.exists():
            time.sleep(0.01)
        if number == victim:
            os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, now)

class Recording(program.ocp.CheckpointManager):
    def save(self, step, args):
        shards = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), shard.index, shard.data)
            for path, leaf in jax.tree_util.tree_flatten_with_path(args.item)[0]
            for shard in leaf.addressable_shards
        ]
        file = base / f"shards-{{number}}"
        file.write_bytes(pickle.dumps([(*place, np.asarray(data)) for *place, data in shards]))
        return super().save(step, args=args)

program.ShardedTraining.batch = held
program.ocp.CheckpointManager = Recording
sys.exit(program.main(sys.argv[1:]))
"""


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what tells of a cluster."""
    return {k: value for k, value in environment.items() if not k.startswith(LAUNCHERS)}


class Cluster:
    """Processes of the program on this machine, and what they print."""

    def __init__(
        self,
        count: int,
        logs: Path,
        environment: dict[str, str],
        options: Sequence[Any],
        devices: int = 1,
        command: Sequence[str] = (sys.executable, str(PROGRAM)),
    ):
        logs.mkdir(parents=True)
        self.logs = [logs / f"{number}.txt" for number in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for log, place in zip(self.logs, environments(count, devices, environment), strict=True):
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *map(str, options)],
                        env=place,
                        cwd=ROOT,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, patience: float = PATIENCE) -> list[int | None]:
        """The exit codes; None of what has not ended in time."""
        end = time.monotonic() + patience
        while any(p.poll() is None for p in self.processes) and time.monotonic() < end:
            time.sleep(0.05)
        return [process.poll() for process in self.processes]

    def wait_for(self, path: Path) -> None:
        """Returns when `path` exists; fails when it cannot any more."""
        end = time.monotonic() + PATIENCE
        while not path.exists():
            ended = [process.poll() for process in self.processes]
            assert set(ended) == {None}, self.printed()
            assert time.monotonic() < end, self.printed()
            time.sleep(0.002)

    def finish(self) -> None:
        codes = self.wait()
        assert codes == [0] * len(self.processes), f"{codes}\n{self.printed()}"

    def lines(self, number: int) -> list[str]:
        """What a process said, without its number."""
        said = self.logs[number].read_text(errors="replace").splitlines()
        return [
            line.removeprefix(f"[{number}] ") for line in said if line.startswith(f"[{number}]")
        ]

    def printed(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)


@contextmanager
def cluster(*args: Any) -> Iterator[Cluster]:
    """A cluster of which nothing is left afterwards, whatever happens."""
    started = Cluster(*args)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


def saved_state(folder: Path, step: int = STEPS, devices: int = 1) -> dict[str, np.ndarray]:
    """The leaves of a checkpoint, read by this process on some of its devices."""
    path = (folder / "checkpoints" / str(step) / "default").resolve()
    mesh = jax.make_mesh((devices,), ("all",), devices=jax.devices()[:devices])

    def sharded(leaf: Any) -> jax.ShapeDtypeStruct:
        divides = leaf.shape and leaf.shape[0] % devices == 0
        spec = jax.P("all") if divides else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        assert metadata is not None
        restored = checkpointer.restore(path, jax.tree.map(sharded, metadata.tree))
    leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {
        jax.tree_util.keystr(key_path, simple=True, separator="/"): np.asarray(leaf)
        for key_path, leaf in leaves
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
