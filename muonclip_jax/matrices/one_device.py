"""Orthogonalisation on one device: sequentially on CPUs, otherwise in stacks."""

import functools
import math
from collections.abc import Sequence

import jax

from muonclip_jax._devices import device_memory
from muonclip_jax.matrices.parts import plan_leaf
from muonclip_jax.matrices.sequential import map_sequentially, plan_chunks
from muonclip_jax.matrices.stacks import map_stacks, plan_stacks
from muonclip_jax.newton_schulz import PolarPlan, apply_polar
from muonclip_jax.routing import MatrixSpec

# On a CPU a stack is a share of the tree, so that the size of the program does not grow with its
# depth. Stacks below the second bound save no memory that counts.
_CPU_STACK_SHARE = 8
_CPU_STACK_BYTES = 24 * 2**20
# Newton-Schulz holds a few copies of a stack; a small device has little room beside the parameters.
_ACCELERATOR_MEMORY_SHARE = 64


def orthogonalize_on_one_device(
    polar: PolarPlan,
    eps: jax.typing.ArrayLike,
    leaves: Sequence[jax.Array],
    specs: Sequence[MatrixSpec],
    max_stack_bytes: int,
) -> list[jax.Array]:
    """Replaces every matrix by its polar factor, in stacks of at most `max_stack_bytes`."""
    memory = device_memory(str(polar.platform))
    if memory is not None:
        max_stack_bytes = min(max_stack_bytes, memory // _ACCELERATOR_MEMORY_SHARE)
    return _program(polar, tuple(specs), max_stack_bytes, eps, list(leaves))


# A call outside of jit compiles as a whole, and once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(
    polar: PolarPlan,
    specs: tuple[MatrixSpec, ...],
    max_bytes: int,
    eps: jax.typing.ArrayLike,
    leaves: list[jax.Array],
) -> list[jax.Array]:
    plans = [plan_leaf(x.shape, spec) for x, spec in zip(leaves, specs, strict=True)]
    dtypes = [x.dtype.name for x in leaves]
    if polar.platform != "cpu":
        plan = plan_stacks(plans, dtypes, max_bytes)
        return map_stacks(lambda x: _polar(polar, x, eps), leaves, plan)
    share = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) // _CPU_STACK_SHARE
    chunks = plan_chunks(plans, dtypes, min(max(_CPU_STACK_BYTES, share), max_bytes))
    return map_sequentially(lambda x: _polar(polar, x, eps), leaves, plans, chunks)


#: An inner jit: matrices of one shape are traced once.
_polar = jax.jit(apply_polar, static_argnums=0)
