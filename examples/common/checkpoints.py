"""Checkpoints by Orbax: whole states, written so that a killed run leaves none half done."""

from pathlib import Path
from typing import Self, cast

import jax
import orbax.checkpoint as ocp

from common.training import State


class Checkpoints:
    """The last two states of a run, in one folder.

    Saving is synchronous: these states are small, and the next step takes the memory of the one
    that is being written.
    """

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, state: State) -> None:
        """Writes the state under its step; a name is given only to what is complete."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def restore(self, like: State) -> State:
        """Returns the last state that was saved whole, or `like` itself where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return like
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        return cast(State, restored)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()
