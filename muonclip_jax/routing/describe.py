"""A printable table of what Muon trains, as which matrices, and why."""

import math

from muonclip_jax._specs import MatrixSpec, matrix_shapes
from muonclip_jax._tree import Tree
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.rules import ADAMW, MUON, MatrixRules, as_rules
from muonclip_jax.routing.suggestions import pattern_for, write_rule


def describe_labels(params: Tree, rules: MatrixRules | None = None) -> str:
    """Prints path, shape, label, matrices and the reason of every leaf.

    Args:
        params: The tree of parameters; only shapes are looked at.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        The table, with a line that counts leaves and numbers below it, and a line for each leaf
        that Muon trains and that may be an output layer or a table of embeddings.

    Raises:
        ValueError: If a leaf of rank three or more is not known, or a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> up, down = jnp.ones((8, 6, 32)), jnp.ones((32, 6, 8))
        >>> layers = {"wi": {"kernel": up}, "wo": {"kernel": down}}
        >>> params = {"layers": layers, "fc": jnp.ones((8, 2))}
        >>> print(describe_labels(params))
        path              shape       label  matrices     why
        fc                (8, 2)      muon   (8, 2)       matrix
        layers/wi/kernel  (8, 6, 32)  muon   6 x (8, 32)  stacked matrices
        layers/wo/kernel  (32, 6, 8)  muon   6 x (32, 8)  stacked matrices
        <BLANKLINE>
        muon: 3 leaves, 3,088 numbers (100.0 %); adamw: 0 leaves, 0 numbers (0.0 %)
        check: fc may be the output layer; MatrixRules([("^fc$", None)]) leaves it to AdamW

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982.
    """
    rules = as_rules(rules)
    decided = rules.decisions(params)
    rules.check_all_matched(params)
    checks: list[str] = []
    rows = [("path", "shape", "label", "matrices", "why")]
    leaves, numbers = {MUON: 0, ADAMW: 0}, {MUON: 0, ADAMW: 0}
    for path, leaf, decision in decided:
        shape = tuple(leaf.shape)
        label = ADAMW if decision.spec is None else MUON
        leaves[label] += 1
        numbers[label] += math.prod(shape)
        matrices = "" if decision.spec is None else _matrices(decision.spec, shape)
        rows.append((path, str(shape), label, matrices, decision.why))
        if decision.flag:
            checks.append(
                f"check: {path} may be {decision.flag}; "
                f"{write_rule(pattern_for([Leaf(path, shape)], ()), None)} leaves it to AdamW"
            )
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
    return "\n".join([*lines, "", counts, *checks])


def _matrices(spec: MatrixSpec, shape: tuple[int, ...]) -> str:
    return " + ".join(
        f"({rows}, {columns})" if count == 1 else f"{count} x ({rows}, {columns})"
        for count, rows, columns in matrix_shapes(spec, shape)
    )
