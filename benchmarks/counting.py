"""Matrix products of the polar factor, their operations, and how few of these symmetry needs.

A product of an `(m, k)` with a `(k, n)` matrix is `2 m k n` operations. `X X^T`, the square of a
symmetric matrix and the product of two that commute are symmetric: one triangle is all that has to
be computed, half of it.
"""

import itertools

from muonclip_jax.newton_schulz.plan import ResolvedPlan

#: The kinds of products on an `(m, n)` matrix with `m <= n`: `X X^T`, two symmetric `(m, m)`
#: matrices, and one of them with `X`. The first two kinds are symmetric.
_NEEDED = {"gram": 0.5, "square": 0.5, "update": 1.0}


def count_products(plan: ResolvedPlan) -> dict[str, int]:
    """Counts the products of each kind that the iteration runs.

    Example:
        >>> from muonclip_jax.newton_schulz import plan_polar
        >>> plain = plan_polar("keller_jordan", ns_method="standard")
        >>> count_products(plain.resolve((8, 16), "float32"))
        {'gram': 5, 'square': 5, 'update': 5}
    """
    if plan.method not in ("standard", "gram"):
        raise ValueError(f"Only iterations have products to count, got method {plan.method!r}.")
    squares = plan.extra_squares + sum(1 for _, _, c in plan.rows if c)
    if plan.method == "standard":
        touches = len(plan.rows)
    else:
        segments = list(itertools.pairwise((0, *plan.restarts, len(plan.rows))))
        touches = len(segments)
        # Beside the square of R: R Z and Z (R Z) in every step but a segment's last, Q Z in every
        # step but its first.
        squares += sum(3 * (stop - start - 1) for start, stop in segments)
    return {"gram": touches, "square": squares, "update": touches}


def product_flops(rows: int, columns: int) -> dict[str, int]:
    """Returns the operations of one whole product of each kind, `rows <= columns`."""
    oblong = 2 * rows * rows * columns
    return {"gram": oblong, "square": 2 * rows**3, "update": oblong}


def needed_flops(plan: ResolvedPlan, rows: int, columns: int) -> float:
    """Counts the operations of all products on one matrix, symmetric ones half."""
    flops = product_flops(rows, columns)
    return sum(_NEEDED[kind] * count * flops[kind] for kind, count in count_products(plan).items())
