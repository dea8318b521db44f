"""How few operations the polar factor's products need: of a symmetric one, half.

A product of an `(m, k)` with a `(k, n)` matrix is `2 m k n` operations. `X X^T`, the square of a
symmetric matrix and the product of two that commute are symmetric: one triangle is all that has to
be computed.
"""

from muonclip_jax.newton_schulz.plan import ResolvedPlan


def needed_flops(plan: ResolvedPlan, rows: int, columns: int) -> float:
    """Counts the operations of all products on one matrix, `rows <= columns`.

    Example:
        >>> from muonclip_jax.newton_schulz import plan_polar
        >>> plain = plan_polar("keller_jordan", ns_method="standard")
        >>> needed_flops(plain.resolve((8, 16), "float32"), 8, 16)  # 5 n^3 (3 * 2 + 1)
        17920.0
    """
    passes = len(plan.restarts) + 1 if plan.method == "gram" else len(plan.rows)
    # Of each pass half of `X X^T` and a whole product with `X`; of all others half.
    return plan.flops / 2 + passes * rows * rows * columns
