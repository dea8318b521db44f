"""One device's turn in a round: it works on the matrices that it has really got."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax.sharding.blocks import Axes
from muonclip_jax.sharding.moves import position
from muonclip_jax.sharding.plan import Job, Round

#: From `(count, rows, columns)` and the axes that share its columns to the same shape and dtype.
#: Where there are such axes, the device has a share of the columns.
Work = Callable[[jax.Array, Axes], jax.Array]


def work_by_hand(work: Work, stacks: Sequence[jax.Array], turn: Round) -> list[jax.Array]:
    """Works on the matrices that this device has really got, and on as few others as it can.

    A stack has a slot for whatever a device may get; what a slot without a matrix holds is never
    looked at, so it may hold anything.
    """
    me = position(turn.exchange.positions)
    packed = [_pack(x, job, me) for x, job in zip(stacks, turn.jobs, strict=True)]

    def play(hand: tuple[int, ...], stacks: list[jax.Array]) -> list[jax.Array]:
        return [
            concatenate([work(x[:count], turn.exchange.split), x[count:]]) if count else x
            for count, x in zip(hand, stacks, strict=True)
        ]

    if len(turn.branches) == 1:
        played = play(turn.branches[0], packed)
    else:
        branch = jnp.asarray(np.array(turn.branch, np.int32))[me]
        played = lax.switch(
            branch, [functools.partial(play, hand) for hand in turn.branches], packed
        )
    return [_unpack(y, x, job, me) for y, x, job in zip(played, stacks, turn.jobs, strict=True)]


def _pack(x: jax.Array, job: Job, me: jax.Array) -> jax.Array:
    """Puts a device's real matrices first."""
    longest = max(map(len, job.table))
    if x.shape[0] == longest and _same(job):
        return x
    slots = range(x.shape[0])
    filled = [[*row, *(slot for slot in slots if slot not in row)] for row in job.table]
    return x[_row([row[:longest] for row in filled], me)]


def _unpack(y: jax.Array, x: jax.Array, job: Job, me: jax.Array) -> jax.Array:
    """Undoes `_pack`."""
    if x.shape[0] == y.shape[0] and _same(job):
        return y
    slots = x.shape[0]
    return y[
        _row(
            [[row.index(slot) if slot in row else 0 for slot in range(slots)] for row in job.table],
            me,
        )
    ]


def _same(job: Job) -> bool:
    return all(row == tuple(range(len(row))) for row in job.table)


def _row(table: Sequence[Sequence[int]], me: jax.Array) -> jax.Array:
    return jnp.asarray(np.array(table, np.int32))[me]


def concatenate(pieces: Sequence[jax.Array]) -> jax.Array:
    """Concatenates along the first axis, where there is more than one piece to concatenate."""
    pieces = [piece for piece in pieces if piece.shape[0]] or pieces[:1]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
