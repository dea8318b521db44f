"""A printable table of what Muon trains, as which matrices, and why."""

import math

from muonclip_jax._fitting import matrix_shapes
from muonclip_jax._specs import MatrixSpec
from muonclip_jax._typing import Tree
from muonclip_jax.routing.rules import ADAMW, MUON, MatrixRules, as_rules


def describe_labels(params: Tree, rules: MatrixRules | None = None) -> str:
    """Prints path, shape, label, matrices and the reason of every leaf.

    Args:
        params: The tree of parameters; only shapes are looked at.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        The table, with a line that counts leaves and numbers below it.

    Raises:
        ValueError: If a leaf of rank three or more is not known, or a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"mlp": {"wi_0": {"kernel": jnp.ones((6, 8, 32))}, "bias": jnp.ones((6, 8))}}
        >>> print(describe_labels(params))
        path             shape       label  matrices     why
        mlp/bias         (6, 8)      adamw               bias
        mlp/wi_0/kernel  (6, 8, 32)  muon   6 x (8, 32)  stacked matrices
        <BLANKLINE>
        muon: 1 leaf, 1,536 numbers (97.0 %); adamw: 1 leaf, 48 numbers (3.0 %)

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982.
    """
    rules = as_rules(rules)
    decided = rules.decisions(params)
    rules.check_all_matched(params)
    rows = [("path", "shape", "label", "matrices", "why")]
    leaves, numbers = {MUON: 0, ADAMW: 0}, {MUON: 0, ADAMW: 0}
    for path, leaf, decision in decided:
        shape = tuple(leaf.shape)
        label = ADAMW if decision.spec is None else MUON
        leaves[label] += 1
        numbers[label] += math.prod(shape)
        matrices = "" if decision.spec is None else _matrices(decision.spec, shape)
        rows.append((path, str(shape), label, matrices, decision.why))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = max(1, sum(numbers.values()))
    counts = "; ".join(
        f"{label}: {leaves[label]} {'leaf' if leaves[label] == 1 else 'leaves'}, "
        f"{numbers[label]:,} numbers ({100 * numbers[label] / total:.1f} %)"
        for label in (MUON, ADAMW)
    )
    return "\n".join([*lines, "", counts])


def _matrices(spec: MatrixSpec, shape: tuple[int, ...]) -> str:
    return " + ".join(
        f"({rows}, {columns})" if count == 1 else f"{count} x ({rows}, {columns})"
        for count, rows, columns in matrix_shapes(spec, shape)
    )
