"""The kernels of all platforms as one implementation.

Which of them runs is decided when a program is lowered, for only then is its platform known: a
program that one machine compiles for another gets the other's.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax.kernels.max_logits.launch import launched
from muonclip_jax.kernels.max_logits.operands import Operands, make_operands, rescale
from muonclip_jax.kernels.max_logits.pallas_gpu import max_logits_gpu, refuse_gpu
from muonclip_jax.kernels.max_logits.pallas_tpu import max_logits_tpu, refuse_tpu
from muonclip_jax.kernels.max_logits.xla import max_logits_xla
from muonclip_jax.kernels.pairs import Geometry, PairArrays
from muonclip_jax.kernels.refusal import refused
from muonclip_jax.kernels.shards import shares_of


@dataclass(frozen=True)
class Kernel:
    """The kernel of one platform.

    Attributes:
        launch: Returns the maxima of every sequence and head `[B, N]`.
        refusal: Says why it cannot serve a call, or None where it can.
        is_partitioned: Whether the platform's partitioner splits it over devices. Elsewhere JAX
            refuses programs for many devices that launch it outside of `jax.shard_map`.
    """

    launch: Callable[..., Float[Array, "B N"]]
    refusal: Callable[[Operands], str | None]
    is_partitioned: bool


#: The kernels by the name that JAX gives a platform.
KERNELS: dict[str, Kernel] = {
    "cuda": Kernel(max_logits_gpu, refuse_gpu, is_partitioned=True),
    # libtpu calls back no partitioner: https://github.com/jax-ml/jax, CustomPartitionerTest.
    "tpu": Kernel(max_logits_tpu, refuse_tpu, is_partitioned=False),
}


def _refusals(*arguments: Any) -> dict[str, str | None]:
    """Says for every platform that has a kernel why it cannot serve a call, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and not mesh.are_all_axes_manual:
        others = [name for name in mesh.axis_names if name not in mesh.manual_axes]
        reason = (
            f"a shard_map over the mesh axes {list(mesh.manual_axes)} leaves {others} to the "
            "partitioner, which does not split a kernel there; map over all axes"
        )
        return dict.fromkeys(KERNELS, reason)
    operands = jax.eval_shape(make_operands, *arguments)
    if 0 in (*operands.query.shape, *operands.key.shape):
        return dict.fromkeys(KERNELS, "there is no pair at all")
    return {platform: kernel.refusal(operands) for platform, kernel in KERNELS.items()}


def refuse_pallas(*arguments: Any) -> str | None:
    """Says why no platform's kernel can serve a call, or returns None."""
    refusals = _refusals(*arguments)
    if None in refusals.values():
        return None
    if len(reasons := set(refusals.values())) == 1:
        return reasons.pop()
    return "; ".join(f"on {platform}, {reason}" for platform, reason in refusals.items())


def max_logits_pallas(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    scale: Float[Array, ""],
    geometry: Geometry,
    arrays: PairArrays,
) -> Float[Array, "K G"]:
    """Returns the maxima, as `max_logits` describes them, from the platform's kernel.

    Lowering for a platform whose kernel cannot serve the call, or that has none, raises
    NotImplementedError.

    Args:
        query: Queries.
        key: Keys.
        scale: What the dot products are multiplied by.
        geometry: Causality and window.
        arrays: Mask, bias and lengths.

    Returns:
        The maxima.
    """
    shares = shares_of(query)
    if shares is not None:
        share = functools.partial(max_logits_pallas, geometry=geometry)
        # What varies between shards is lost where Pallas interprets a kernel.
        return shares.maxima(share, query, key, scale, arrays, check_vma=False)
    arguments = (query, key, scale, arrays)
    refusals = _refusals(*arguments)

    def by_kernel(kernel: Kernel, *arguments: Any) -> jax.Array:
        operands = make_operands(*arguments)
        maxima = launched(kernel.launch, geometry, operands, is_partitioned=kernel.is_partitioned)
        return jnp.max(rescale(maxima, arguments[2]), axis=0).reshape(query.shape[2:4])

    def otherwise(reason: str, query: Any, key: Any, scale: Any, arrays: Any) -> jax.Array:
        meaning = max_logits_xla(query, key, scale, geometry, arrays)
        return refused(
            meaning, f"implementation='pallas' cannot be used: {reason}; use 'xla' or None."
        )

    branches = {
        platform: functools.partial(by_kernel, kernel)
        if refusals[platform] is None
        else functools.partial(otherwise, str(refusals[platform]))
        for platform, kernel in KERNELS.items()
    }
    unknown = f"it has kernels for {' and '.join(KERNELS)}, and this program runs elsewhere"
    return lax.platform_dependent(
        *arguments, default=functools.partial(otherwise, unknown), **branches
    )
