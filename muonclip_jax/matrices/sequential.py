"""The polar factors of a tree on one device: in stacks, or for CPUs sequentially.

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

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._devices import device_memory
from muonclip_jax.matrices.parts import (
    LeafPlan,
    Part,
    Run,
    even_size,
    from_matrices,
    plan_leaf,
    runs_by_shape,
    split_leaf,
)
from muonclip_jax.matrices.stacks import map_parts, plan_stacks
from muonclip_jax.newton_schulz import PolarPlan, apply_polar
from muonclip_jax.routing import MatrixSpec

# On a CPU a stack is a share of the tree, so that the size of the program does not grow with its
# depth. Stacks below the second bound save no memory that counts.
_CPU_STACK_SHARE = 8
_CPU_STACK_BYTES = 24 * 2**20
# Newton-Schulz holds a few copies of a stack; a small device has little room beside the parameters.
_ACCELERATOR_MEMORY_SHARE = 64

# Unlike indexing, without code for negative offsets.
_read = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
_write = functools.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)


def orthogonalize_on_one_device(
    polar: PolarPlan,
    specs: Sequence[MatrixSpec],
    max_stack_bytes: int,
    eps: jax.typing.ArrayLike,
    leaves: Sequence[jax.Array],
) -> list[jax.Array]:
    """Replaces every matrix by its polar factor, in stacks of at most `max_stack_bytes`."""
    plans = [plan_leaf(x.shape, spec) for x, spec in zip(leaves, specs, strict=True)]
    dtypes = [x.dtype.name for x in leaves]
    function = functools.partial(_polar, polar, eps=eps)
    if polar.platform == "cpu":
        share = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) // _CPU_STACK_SHARE
        chunks = plan_chunks(plans, dtypes, min(max(_CPU_STACK_BYTES, share), max_stack_bytes))
        return map_sequentially(function, leaves, plans, chunks)
    memory = device_memory(str(polar.platform))
    if memory is not None:
        max_stack_bytes = min(max_stack_bytes, memory // _ACCELERATOR_MEMORY_SHARE)
    parts = map_parts(function, leaves, plan_stacks(plans, dtypes, max_stack_bytes))
    return [from_matrices(x, leaf) for x, leaf in zip(parts, plans, strict=True)]


#: An inner jit: matrices of one shape are traced once.
_polar = jax.jit(apply_polar, static_argnums=0)


def plan_chunks(
    leaves: Sequence[LeafPlan], dtypes: Sequence[str], max_bytes: int
) -> list[list[Run]]:
    """Plans the chunks of a tree, from plans and dtypes of its leaves: the parts of each.

    A stack has at most `max_bytes` and one dtype; a larger part is a chunk of its own. Matrices
    without entries are in no chunk.
    """
    chunks: list[list[Run]] = []
    for limit, parts in runs_by_shape(leaves, dtypes, max_bytes):
        small = [run for run in parts if run.stop <= limit]
        chunks += [[run] for run in parts if run.stop > limit]
        filled = size = even_size(sum(run.stop for run in small), limit) if small else 0
        for run in small:
            if filled + run.stop > size:
                chunks.append([])
                filled = 0
            chunks[-1].append(run)
            filled += run.stop
    return chunks


def map_sequentially(
    function: Callable[[jax.Array], jax.Array],
    leaves: Sequence[jax.Array],
    plans: Sequence[LeafPlan],
    chunks: Sequence[Sequence[Run]],
) -> list[jax.Array]:
    """Replaces every matrix of the leaves by `function` of it, by chunk.

    Tall matrices are transposed, so that `A` and `B^T` share a chunk's program.
    """
    pieces = [split_leaf(x, leaf) for x, leaf in zip(leaves, plans, strict=True)]
    if not chunks:  # no matrix has entries
        return list(leaves)
    starts = [
        list(itertools.accumulate([x.stop for x in chunk[:-1]], initial=0)) for chunk in chunks
    ]
    proceed = _opaque_true(pieces[chunks[0][0].leaf][chunks[0][0].part])
    # As data that the compiler does not constant-fold.
    numbers = sorted(set(itertools.chain.from_iterable(starts)))
    data = lax.cond(
        proceed, lambda: list(map(jnp.int32, numbers)), lambda: [jnp.int32(-1 - n) for n in numbers]
    )
    offset_of = dict(zip(numbers, data, strict=True))
    for chunk, start in zip(chunks, starts, strict=True):
        parts = [plans[run.leaf].parts[run.part] for run in chunk]
        operands = [pieces[run.leaf][run.part] for run in chunk]
        offsets = [offset_of[number] for number in start] if len(chunk) > 1 else []
        work = functools.partial(_process, function, parts)
        stack = lax.cond(proceed, work, functools.partial(_idle, parts), operands, offsets)
        proceed = _opaque_true(stack)
        results = [_read(stack, at, run.stop) for at, run in zip(offsets, chunk, strict=False)]
        for run, part, x in zip(chunk, parts, results or [stack], strict=True):
            pieces[run.leaf][run.part] = x.mT if part.fan_in > part.fan_out else x
    return [from_matrices(x, leaf) for x, leaf in zip(pieces, plans, strict=True)]


def _process(
    function: Callable[[jax.Array], jax.Array],
    parts: Sequence[Part],
    operands: list[jax.Array],
    offsets: list[jax.Array],
) -> jax.Array:
    """The stack of a chunk's results, `(count, rows, columns)` with `rows <= columns`.

    Operands have their own shapes: a reshape before the conditional would be fused into the
    operation that makes the direction, which then could not reuse the gradient's buffer.
    """
    stacks = [part.matrices(x) for part, x in zip(parts, operands, strict=True)]
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in stacks]
    stack = wide[0]
    if offsets:
        stack = jnp.zeros((sum(map(len, wide)), *stack.shape[1:]), stack.dtype)
    for x, offset in zip(wide, offsets, strict=False):
        # The condition always holds. It turns the copy into a fusion: identical fusions are
        # compiled once, plain update slices one by one.
        stack = _write(stack, jnp.where(offset >= 0, x, 0), offset)
    return map_matrices(function, stack)


def _idle(parts: Sequence[Part], operands: list[jax.Array], offsets: list[jax.Array]) -> jax.Array:
    """The branch that is never taken, with the form of the results.

    Derived from an operand, since in a checked `shard_map` both branches must vary over the same
    mesh axes; not an operand itself, which would be copied.
    """
    del offsets
    zero = jnp.zeros_like(operands[0][(0,) * operands[0].ndim])
    shape = sum(part.count for part in parts), *sorted((parts[0].fan_in, parts[0].fan_out))
    return jnp.broadcast_to(zero, shape)


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
