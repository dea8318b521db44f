"""A printable table of the cost of Newton-Schulz per step, by matrix shape."""

from collections import Counter

import jax

from muonclip_jax._devices import plan_platform
from muonclip_jax._specs import matrix_shapes
from muonclip_jax._tree import Tree
from muonclip_jax.newton_schulz import coefficients, plan_polar
from muonclip_jax.routing import MatrixRules, resolve_specs

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))
# Of a token that passes a matrix: two in the forward pass and four in the backward, a number.
_TRAINING_FLOPS = 6


def describe_cost(
    params: Tree,
    rules: MatrixRules | None = None,
    *,
    ns_coeffs: coefficients.Coefficients = coefficients.DEFAULT_SET,
    ns_steps: int | None = None,
    ns_method: str = coefficients.DEFAULT_METHOD,
    ns_dtype: jax.typing.DTypeLike | None = coefficients.DEFAULT_DTYPE,
    platform: str | None = None,
) -> str:
    """Counts the floating-point operations of Newton-Schulz in one step.

    Args:
        params: The parameters; only shapes and dtypes are used.
        rules: A `MatrixRules`; None means `MatrixRules()`.
        ns_coeffs: As for `muonclip`.
        ns_steps: As for `muonclip`.
        ns_method: As for `muonclip`.
        ns_dtype: As for `muonclip`.
        platform: "cpu", "gpu" or "tpu": the target platform. None means JAX's default.

    Returns:
        A line for every matrix shape, with method, dtype of the products, and operations of one
        matrix and of all; and a line with the sum. The exact polar factor ("svd") is not counted.

    Raises:
        ValueError: If a leaf of rank three or more is not recognised, or an argument is invalid.

    Example:
        >>> import jax
        >>> params = {"layers": {"wi": jax.ShapeDtypeStruct((24, 768, 3072), "float32")}}
        >>> print(describe_cost(params, MatrixRules(scan_axis=0), platform="cpu"))
        matrices          method  dtype    one matrix  all
        24 x (768, 3072)  gram    float32  22.6 GFLOP  544 GFLOP
        <BLANKLINE>
        24 matrices, 544 GFLOP a step on cpu; the forward and backward pass of 1,600 tokens
        through them costs as much
    """
    polar = plan_polar(ns_coeffs, ns_steps, ns_method, ns_dtype, platform=platform)
    platform = plan_platform(polar.platform)
    counts: Counter[tuple[int, int, str]] = Counter()
    for _, leaf, spec in resolve_specs(params, rules=rules):
        for count, *sides in () if spec is None else matrix_shapes(spec, leaf.shape):
            if min(count, *sides):
                counts[min(sides), max(sides), str(leaf.dtype)] += count
    if not counts:
        return "Muon trains no matrix here: no cost."
    rows: list[tuple[str, ...]] = [("matrices", "method", "dtype", "one matrix", "all")]
    total = tokens = 0
    for (m, n, dtype), count in counts.items():
        resolved = polar.resolve((m, n), dtype)
        total += count * resolved.flops
        tokens += count * m * n * _TRAINING_FLOPS
        costs = "not counted", ""
        if resolved.method != "svd":
            costs = _flops(resolved.flops), _flops(count * resolved.flops)
        rows.append((f"{count:,} x ({m}, {n})", resolved.method, resolved.dtype, *costs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    summary = f"{counts.total():,} {'matrix' if counts.total() == 1 else 'matrices'}"
    if total:
        summary += (
            f", {_flops(total)} a step on {platform}; the forward and backward pass of "
            f"{round(total / tokens):,} tokens\nthrough them costs as much"
        )
    return "\n".join([*table, "", summary])


def _flops(number: float) -> str:
    scale, unit = next(((s, u) for s, u in _UNITS if number >= s), (1, "FLOP"))
    value = number / scale
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"
