"""Newton-Schulz on wide matrices whose columns several devices share.

`X = [X_1 ... X_k]` lies on `k` devices, and what couples them is small: `X X^H = sum_i X_i X_i^H`
is one sum over devices of an `m x m` matrix, whatever the number of columns. Each device then
squares its own rows of it, and the update acts on columns one by one:

    A = sum_i X_i X_i^H                      all-reduce
    B = b A + c A^2                          rows shared, all-gather
    X_i <- a X_i + B X_i

All `k` devices together do the work of one; they pay with two collectives of `m x m` a step
(`shares`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from muonclip_jax.newton_schulz._orthogonalize import apply_polar
from muonclip_jax.newton_schulz.defaults import DEFAULT_EPS
from muonclip_jax.newton_schulz.newton_schulz import newton_schulz
from muonclip_jax.newton_schulz.plan import PolarPlan
from muonclip_jax.newton_schulz.preconditioning import normalize
from muonclip_jax.newton_schulz.shares import shares_along


def apply_polar_partitioned(
    plan: PolarPlan,
    x: Inexact[Array, "*batch m share"],
    axes: tuple[str, ...],
    eps: jax.typing.ArrayLike = DEFAULT_EPS,
) -> Inexact[Array, "*batch m share"]:
    """Orthogonalises matrices of which every device along `axes` has some columns.

    Always the plain iteration: the Gram form's products are all of the small kind, which are the
    ones that have to be sent. For "svd" every device gathers the matrix.

    Args:
        plan: From `plan_polar`.
        x: `(..., m, share)`: this device's columns, in any order. The whole matrices must have at
            least as many columns as rows.
        axes: Names of the mapped axes (of `jax.shard_map` or `jax.pmap`) that share the columns.
        eps: As in `apply_polar`.

    Returns:
        The same columns of the result, in the dtype of `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from muonclip_jax.newton_schulz import plan_polar
        >>> mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> columns = jax.sharding.PartitionSpec(None, "tp")
        >>> polar = jax.jit(jax.shard_map(
        ...     lambda x: apply_polar_partitioned(plan_polar(), x, ("tp",)),
        ...     mesh=mesh, in_specs=columns, out_specs=columns))
        >>> polar(jnp.eye(2, 4)).shape
        (2, 4)
    """
    if plan.method == "svd":
        return _svd(plan, x, axes, eps)
    shares = shares_along(axes, plan.implementation, plan.platform)
    whole = (*x.shape[:-1], x.shape[-1] * lax.axis_size(axes))
    resolved = dataclasses.replace(plan, method="standard").resolve(whole, x.dtype)
    wide, work = resolved.dtypes(x.dtype)
    y = x.astype(jnp.promote_types(wide, x.dtype))
    y = normalize(y, plan.preconditioning, eps, plan.relative_eps, shares).astype(wide)
    y = newton_schulz(y, resolved.rows, plan.preconditioning, work, shares)
    return y.astype(x.dtype)


def _svd(
    plan: PolarPlan, x: jax.Array, axes: tuple[str, ...], eps: jax.typing.ArrayLike
) -> jax.Array:
    last = x.ndim - 1
    whole = apply_polar(plan, lax.all_gather(x, axes, axis=last, tiled=True), eps)
    share = x.shape[-1]
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(axes) * share, share, axis=last)
