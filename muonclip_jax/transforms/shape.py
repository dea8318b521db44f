"""`scale_by_shape`: a factor for every matrix by its fan-in and fan-out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike
from muonclip_jax.matrices import join_leaf, plan_leaf, shape_rule, split_leaf
from muonclip_jax.routing import MatrixRules, MatrixSpec, resolve_muon_specs
from muonclip_jax.transforms._checks import check_positive
from muonclip_jax.transforms._scale_by_muon import WeightDimNumOrFn


@names_known
def scale_by_shape(
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
    consistent_rms: ScalarLike | None = None,
    *,
    rules: MatrixRules | None = None,
    rule: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by a factor of the shape of each matrix.

    With `fan_in` rows and `fan_out` columns of `y = x @ W`, after all reduction axes and all output
    axes have been flattened, and each part of a fused kernel by its own shape:

        sqrt(max(1, fan_out / fan_in))                  by default
        consistent_rms sqrt(max(fan_in, fan_out))       with consistent_rms

    The second makes the RMS of an orthogonal update `consistent_rms` whatever the shape (Liu et al.
    2025, Lemma 1); 0.2 lets it use AdamW's learning rate and decay.

    Args:
        weight_dimension_numbers: As in `scale_by_muon`.
        consistent_rms: RMS of a full-rank update. May be traced.
        rules: As in `scale_by_muon`.
        rule: Another factor, by a name of `matrices.SHAPE_RULES`.

    Returns:
        A stateless transformation.

    Raises:
        ValueError: If both `consistent_rms` and `rule` are given, a rule is unknown, or
            `consistent_rms` is not positive; while tracing for a leaf that is no matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_shape(consistent_rms=0.2)
        >>> params = {"w": jnp.ones((4, 25))}
        >>> float(tx.update(params, tx.init(params))[0]["w"][0, 0])
        1.0
    """
    if consistent_rms is not None:
        instead = "Write 0.2 for AdamW's RMS, None for none."
        check_positive("consistent_rms", consistent_rms, instead)
    if rule is not None and consistent_rms is not None:
        raise ValueError(
            f"scale_by_shape takes consistent_rms or rule, got consistent_rms={consistent_rms} "
            f"and rule={rule!r}. Leave one of them out."
        )
    factor = shape_rule("width_transfer" if rule is None else rule)

    def scale(fan_in: int, fan_out: int) -> ScalarLike:
        if fan_in * fan_out == 0:
            return 1.0
        if consistent_rms is not None:
            return math.sqrt(max(fan_in, fan_out)) * consistent_rms
        return factor(fan_in, fan_out)

    def scale_leaf(x: jax.Array, spec: MatrixSpec) -> jax.Array:
        plan = plan_leaf(x.shape, spec)
        pieces = [
            _multiply(piece, scale(part.fan_in, part.fan_out))
            for piece, part in zip(split_leaf(x, plan.splits), plan.parts, strict=True)
        ]
        return join_leaf(pieces, plan.splits)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        specs = resolve_muon_specs(updates, weight_dimension_numbers, rules)
        scaled = [scale_leaf(x, spec) for _, x, spec in specs]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _multiply(x: jax.Array, scale: ScalarLike) -> jax.Array:
    """`scale x` in `x`'s dtype, rounded once."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.asarray(scale * x.astype(wide), x.dtype)
