"""`scale_by_shape`: a factor for every matrix by its fan-in and fan-out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import ScalarLike
from muonclip_jax.routing import MatrixRules
from muonclip_jax.transforms._checks import check_positive
from muonclip_jax.transforms._matrix_axes import MatrixAxes, matrix_axes
from muonclip_jax.transforms._orthogonalize_updates import WeightDimNumOrFn

#: Factors of an orthogonal matrix by (fan_in, fan_out), which are numbers or arrays of them.
_RULES: dict[str, Callable[..., np.ndarray]] = {
    # Keller Jordan; Optax's default; torch's "original".
    "width_transfer": lambda fan_in, fan_out: np.sqrt(np.maximum(1.0, fan_out / fan_in)),
    # Unit RMS-to-RMS operator norm: Scion; dion's "spectral_norm".
    "rms_to_rms": lambda fan_in, fan_out: np.sqrt(fan_out / fan_in),
}


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
        rule: "width_transfer", which is the default, or "rms_to_rms": `sqrt(fan_out / fan_in)`, as
            in Scion.

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
        instead = " Write 0.2 for AdamW's RMS, None for none."
        check_positive("consistent_rms", consistent_rms, instead)
    if rule is not None and consistent_rms is not None:
        raise ValueError(
            f"scale_by_shape takes consistent_rms or rule, got consistent_rms={consistent_rms} "
            f"and rule={rule!r}. Leave one of them out."
        )
    factor = _RULES.get("width_transfer" if rule is None else rule)
    if factor is None:
        raise ValueError(
            f"rule={rule!r} is not known. Write {' or '.join(map(repr, _RULES))}; "
            "c sqrt(max(fan_in, fan_out)) is consistent_rms=c."
        )

    def scale_leaf(x: jax.Array, axes: MatrixAxes) -> jax.Array:
        if x.size == 0:
            return x
        fan_in, fan_out = axes.size(x.shape, "inputs"), axes.size(x.shape, "outputs")
        if consistent_rms is None:
            scale = factor(fan_in, fan_out)
        else:
            scale = np.sqrt(np.maximum(fan_in, fan_out)) * consistent_rms
        # Rounded once.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (jnp.asarray(scale, wide) * x.astype(wide)).astype(x.dtype)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        axes = matrix_axes(updates, rules, weight_dimension_numbers=weight_dimension_numbers)
        return jax.tree.map(scale_leaf, updates, axes), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
