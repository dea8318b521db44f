"""Trains the byte-level GPT with MuonClip on all devices of all hosts, and goes on after a loss.

    python examples/train_multihost.py --processes 2 --smoke    two processes on this machine
    python examples/train_multihost.py --processes 1            this process alone
    srun python examples/train_multihost.py                     Slurm; a TPU pod is the same

Every host runs this same program; docs/multihost.md says how to start it on Cloud TPU, Slurm and
Kubernetes. Parameters, optimizer and batch are sharded over all devices. Started again with the
same options, it goes on from its newest checkpoint, on as many devices as there are then.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from common.data import Corpus, load_corpus
from common.model import ModelConfig
from common.processes import ADDRESS, NUMBER, PLACE, launch
from common.records import Metrics, describe, open_folder
from common.sharding import param_shardings
from common.training import Settings, State, Training
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax import checkpoint


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--processes", type=int, help="processes to start on this machine; None joins a cluster")
    add("--devices", type=int, default=1, help="CPU devices of a process that --processes starts")
    add("--tp", type=int, default=1, help="devices that share the heads of a layer")
    add("--steps", type=int, default=Settings.steps)
    add("--batch-size", type=int, default=Settings.batch_size, help="windows, over all devices")
    add("--layers", type=int, default=ModelConfig.layers)
    add("--width", type=int, default=ModelConfig.width)
    add("--data", nargs="+", type=Path, default=(), help="files or folders instead of the stdlib")
    add("--folder", type=Path, default=Path("runs/multihost"), help="on storage that all hosts see")
    add("--checkpoint-every", type=int, default=50)
    add("--heartbeat", type=int, default=100, help="seconds of silence until a host counts as dead")
    add("--smoke", action="store_true", help="a short run, to see that everything works")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps, options.checkpoint_every = min(options.steps, 20), 5
        options.batch_size, options.layers, options.width = 8, 1, 32
    return options


def connect(heartbeat: int) -> None:
    """Joins the other processes. Nothing before it may touch a device."""
    count, number = (int(os.environ[name]) if name in os.environ else None for name in PLACE)
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=number, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:
        raise SystemExit(
            f"No cluster was found ({error}) Write --processes 1 to train in this process alone, "
            f"--processes 2 to start two on this machine, or set {ADDRESS}, {' and '.join(PLACE)} "
            "for every process."
        ) from error


class ShardedTraining(Training):
    """The training of the other examples on a mesh; every process has a part of each array."""

    def __init__(self, settings: Settings, corpus: Corpus, mesh: Mesh):
        super().__init__(settings, corpus)
        self.mesh = mesh
        params = jax.eval_shape(super().init).params
        shardings = param_shardings(mesh, params)
        self.tx = mc.muonclip(
            settings.schedule(),
            weight_decay=settings.decay,
            qk_clip_threshold=settings.threshold,
            param_shardings=shardings,
        )
        #: Shapes and shardings of the state: what `init` makes and what a restore aims at.
        self.target: Any = State(
            step=cast(Any, jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))),
            params=checkpoint.abstract_params(params, shardings),
            optimizer=checkpoint.abstract_state(self.tx, params, shardings),
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, self.target)
        self.scored: Any = self.on_mesh(self.scored)
        # No process ever holds the whole state, not even while it is made. The loss and the
        # maxima are over the global batch: XLA adds the collectives.
        init = jax.jit(super().init, out_shardings=places)
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(places, None))
        # Compiled before any of it runs: gloo gives the processes 30 seconds to meet in their
        # first collective, and they do not compile at the same speed.
        self.init: Any = init.lower().compile()
        self.step: Any = step.lower(self.target, self.batch(0)).compile()
        self.score: Any = self.score.lower(self.target.params, self.scored).compile()
        everyone = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes("compiled", processes=everyone)

    def batch(self, step: int) -> jax.Array:
        """The windows of a step, a function of seed and step: the data position of a restart."""
        return self.on_mesh(super().batch(step))

    def on_mesh(self, windows: np.ndarray) -> jax.Array:
        """Returns the batch of all processes; each gives the rows of its own devices alone.

        Where the devices along "fsdp" do not divide the rows, each has all of them: the numbers are
        those of any other count, so that a run goes on, and only time is lost.
        """
        divides = len(windows) % self.mesh.shape["fsdp"] == 0
        sharding = NamedSharding(self.mesh, P("fsdp") if divides else P())
        return jax.make_array_from_callback(windows.shape, sharding, lambda index: windows[index])


def make_mesh(tp: int) -> Mesh:
    """Returns the mesh of all devices of all processes, `tp` of them for a layer's heads."""
    count = jax.device_count()
    if tp < 1 or count % tp:
        fitting = [str(size) for size in range(1, count + 1) if count % size == 0]
        raise SystemExit(
            f"--tp {tp} does not divide the {count} devices of the {jax.process_count()} "
            f"processes, and some would do nothing. Write one of --tp {', '.join(fitting)}."
        )
    return jax.make_mesh((count // tp, tp), ("fsdp", "tp"), (AxisType.Auto,) * 2)


def train(options: argparse.Namespace) -> None:
    """Trains as one of the processes, or as the only one."""
    if options.processes != 1:
        connect(options.heartbeat)
    number = jax.process_index()

    def say(text: str) -> None:
        # In one piece, for all processes may write to one pipe.
        print(f"[{number}] {text}\n", end="", flush=True)

    settings = Settings(
        learning_rate=Settings().rate,
        steps=options.steps,
        batch_size=options.batch_size,
        model=ModelConfig(options.layers, options.width, hidden=8 * (options.width // 3)),
    )
    mesh = make_mesh(options.tp)
    if number == 0:
        described = describe(settings) | {"data": [str(path) for path in options.data]}
        open_folder(options.folder, described, resume=(options.folder / "settings.json").exists())
    training = ShardedTraining(settings, load_corpus(options.data), mesh)

    # Saves while training goes on. All processes take part in everything that this object does.
    checkpoints = ocp.CheckpointManager(
        (options.folder / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
        item_handlers=ocp.StandardCheckpointHandler(),
    )
    newest = checkpoints.latest_step()
    if newest is None:
        state = training.init()
    else:
        checkpoint.check_saved(checkpoints.item_metadata(newest), training.target)
        restored = checkpoints.restore(newest, args=ocp.args.StandardRestore(training.target))
        state = cast(State, restored)
    begin = int(state.step)
    say(f"{jax.process_count()} processes, mesh {dict(mesh.shape)}, from step {begin}")
    ways = mesh.shape["fsdp"]
    if settings.batch_size % ways and number == 0:
        say(
            f"{ways} devices along fsdp do not divide --batch-size {settings.batch_size}: each "
            f"computes all of it. A new run is faster with a multiple of {ways}."
        )
    metrics = Metrics(options.folder, step=begin) if number == 0 else None

    pending: list[dict[str, jax.Array]] = []
    for step in range(begin, settings.steps):
        state, record = training.step(state, training.batch(step))
        pending.append(record)
        done = step + 1
        # A cluster that takes its machines back says so before; all processes agree on the step.
        told_to_end = checkpoints.reached_preemption(done)
        last = told_to_end or done == settings.steps
        if done % settings.score_every == 0 or last:
            records = [
                {"step": done - len(pending) + i} | {k: v.item() for k, v in values.items()}
                for i, values in enumerate(jax.device_get(pending), start=1)
            ]
            if metrics is not None:
                metrics.write(records)
            say(f"step {done}: loss {records[-1]['train_loss']:.6f}")
            pending = []
        if done % options.checkpoint_every == 0 or last:
            checkpoints.save(done, args=ocp.args.StandardSave(state))
        if told_to_end:
            break
    loss = float(training.score(state.params, training.scored))
    checkpoints.close()
    say(f"held-out loss {loss:.6f} after step {int(state.step)}")


def main(arguments: list[str]) -> int:
    """Starts the processes, or is one of them."""
    options = parse(arguments)
    if (options.processes or 1) > 1 and NUMBER not in os.environ:
        return launch(__file__, arguments, options.processes, options.devices)
    try:
        train(options)
    except Exception:
        # The others wait for this process; at a normal exit it would wait for them.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
