"""Sequential processing of matrices, for CPUs.

One matrix keeps all cores of a CPU busy, so batched products are not faster. Sequential processing
saves temporary memory and compile time. Parts of the same shape form a *chunk*: they are copied
into a stack of bounded size, a loop replaces the matrices of the stack in place, and the results
are sliced from it. A part larger than the bound (scanned layers) is a chunk by itself and is not
copied.

Two properties of XLA's CPU backend shape the code:

1. It schedules independent operations concurrently, so the temporaries of all chunks would be live
   at once; `lax.optimization_barrier` does not prevent this. Therefore each chunk is a branch of a
   conditional whose predicate depends on the result of the previous chunk. The predicate is always
   true, but the compiler cannot infer this.
2. It compiles equal fusions once, and everything else wherever it stands. `stack[3]` and `stack[4]`
   differ; with the offset as data they are equal. Therefore offsets are data.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax.matrices.parts import LeafPlan, Part, from_matrices, parts_by_shape, split_leaf


@dataclass(frozen=True)
class Chunk:
    """Equally shaped parts that share a stack: `(leaf, part)` of each, and its matrices."""

    parts: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """The start of each part in the stack."""
        return tuple(itertools.accumulate(self.counts[:-1], initial=0))


def plan_chunks(leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int) -> list[Chunk]:
    """Plans the chunks of a tree, from plans and dtypes of its leaves.

    A stack has at most `max_bytes` and one dtype; a larger part is a chunk of its own. Matrices
    without entries are in no chunk.
    """
    chunks: list[Chunk] = []
    for (rows, columns, dtype), members in parts_by_shape(leaves, dtypes).items():
        limit = max(1, max_bytes // (rows * columns * jnp.dtype(dtype).itemsize))
        small = []
        for leaf, part, count in members:
            if count > limit:
                chunks.append(Chunk(((leaf, part),), (count,)))
            else:
                small.append((leaf, part, count))
        # Nearly equal sizes: 13 matrices under a limit of 8 are 7 and 6, not 8 and 5.
        total = sum(count for *_, count in small)
        size = -(-total // max(1, -(-total // limit)))
        parts, counts = [], []
        for leaf, part, count in small:
            if counts and sum(counts) + count > size:
                chunks.append(Chunk(tuple(parts), tuple(counts)))
                parts, counts = [], []
            parts.append((leaf, part))
            counts.append(count)
        if counts:
            chunks.append(Chunk(tuple(parts), tuple(counts)))
    return chunks


def map_sequentially(
    function: Callable[[jax.Array], jax.Array],
    leaves: Sequence[jax.Array],
    plans: Sequence[LeafPlan],
    chunks: Sequence[Chunk],
) -> list[jax.Array]:
    """Replaces every matrix of the leaves by `function` of it, by chunk.

    Tall matrices are transposed, so that `A` and `B^T` share a chunk's program.
    """
    pieces = [split_leaf(x, leaf.splits) for x, leaf in zip(leaves, plans, strict=True)]
    if not chunks:  # no matrix has entries
        return list(leaves)
    leaf, part = chunks[0].parts[0]
    proceed = _opaque_true(pieces[leaf][part])
    positions = _as_data({offset for chunk in chunks for offset in chunk.offsets}, proceed)
    for chunk in chunks:
        parts = [plans[leaf].parts[part] for leaf, part in chunk.parts]
        offsets = [positions[offset] for offset in chunk.offsets] if len(parts) > 1 else []
        operands = [pieces[leaf][part] for leaf, part in chunk.parts]
        stack = _process(function, proceed, parts, operands, offsets)
        proceed = _opaque_true(stack)
        slices = [_read(stack, *at) for at in zip(offsets, chunk.counts, strict=False)] or [stack]
        for (leaf, number), part, result in zip(chunk.parts, parts, slices, strict=True):
            pieces[leaf][number] = result.mT if part.fan_in > part.fan_out else result
    return [from_matrices(x, leaf) for x, leaf in zip(pieces, plans, strict=True)]


def _process(
    function: Callable[[jax.Array], jax.Array],
    proceed: jax.Array,
    parts: Sequence[Part],
    operands: list[jax.Array],
    offsets: list[jax.Array],
) -> jax.Array:
    """Returns the stack of a chunk's results, `(count, rows, columns)` with `rows <= columns`."""

    # Operands have their own shapes: a reshape before the conditional would be fused into the
    # operation that makes the direction, which then could not reuse the gradient's buffer.
    def work(operands: list[jax.Array], offsets: list[jax.Array]) -> jax.Array:
        stacks = [_wide(part.matrices(x)) for part, x in zip(parts, operands, strict=True)]
        return map_matrices(function, _concatenate(stacks, offsets))

    def idle(operands: list[jax.Array], offsets: list[jax.Array]) -> jax.Array:
        # Derived from an operand, since in a checked `shard_map` both branches must vary over the
        # same mesh axes; not an operand itself, which would be copied.
        del offsets
        zero = jnp.zeros_like(operands[0][(0,) * operands[0].ndim])
        shape = sum(part.count for part in parts), *sorted((parts[0].fan_in, parts[0].fan_out))
        return jnp.broadcast_to(zero, shape)

    return lax.cond(proceed, work, idle, operands, offsets)


def map_matrices(function: Callable[[jax.Array], jax.Array], stack: jax.Array) -> jax.Array:
    """Replaces the matrices of a stack in a loop, in place."""
    if len(stack) == 1:
        return function(stack[0])[None]

    def replace(index: jax.Array, stack: jax.Array) -> jax.Array:
        return _write(stack, function(_read(stack, index, 1)[0])[None], index)

    return lax.fori_loop(np.int32(0), np.int32(len(stack)), replace, stack)


def _opaque_true(x: jax.Array) -> jax.Array:
    """A predicate from `x` that is always true, also for NaN, but that XLA cannot infer."""
    number = jnp.real(x[(0,) * x.ndim]).astype(jnp.float32)
    # No number is below -1 once clamped; XLA does not track the range of floats.
    return ~(lax.clamp(np.float32(-1), number, np.float32(1)) < -2)


def _as_data(offsets: set[int], true: jax.Array) -> dict[int, jax.Array]:
    """The offsets as data that the compiler does not constant-fold."""
    values = lax.cond(
        true,
        lambda: [jnp.int32(offset) for offset in sorted(offsets)],
        lambda: [jnp.int32(-1 - offset) for offset in sorted(offsets)],
    )
    return dict(zip(sorted(offsets), values, strict=True))


def _concatenate(pieces: Sequence[jax.Array], offsets: Sequence[jax.Array]) -> jax.Array:
    if len(pieces) == 1:
        return pieces[0]
    stack = jnp.zeros((sum(map(len, pieces)), *pieces[0].shape[1:]), pieces[0].dtype)
    for piece, offset in zip(pieces, offsets, strict=True):
        # The condition always holds. It turns the copy into a fusion: identical fusions are
        # compiled once, plain update slices one by one.
        stack = _write(stack, jnp.where(offset >= 0, piece, 0), offset)
    return stack


def _wide(x: jax.Array) -> jax.Array:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _read(stack: jax.Array, offset: jax.Array, count: int) -> jax.Array:
    # Unlike `stack[offset]`, without code for negative offsets.
    return lax.dynamic_slice_in_dim(stack, offset, count, allow_negative_indices=False)


def _write(stack: jax.Array, piece: jax.Array, offset: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(
        stack, piece, offset, axis=0, allow_negative_indices=False
    )
