"""From a leaf's path and shape to its spec: the user's rules, then the first row of the table.

Nothing but the path and the shape of one leaf is looked at, so a masked or partial tree is routed
like the full one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._names import LeafName, read_path
from muonclip_jax._specs import MatrixSpec, Split
from muonclip_jax.routing.table import ROWS, SHAPES, Row


@dataclass(frozen=True)
class Decision:
    """What a leaf is: its spec (None is AdamW), or an open question, and why."""

    spec: MatrixSpec | None
    why: str
    unknown: bool = False


_compiled = lru_cache(maxsize=None)(re.compile)


def _fits(pattern: str | None, text: str) -> bool:
    return pattern is None or _compiled(pattern).fullmatch(text) is not None


def _names_fit(row: Row, name: LeafName, stacked: bool) -> bool:
    return (
        (row.stacked is None or row.stacked == stacked)
        and _fits(row.role, name.role)
        and _fits(row.leaf, name.leaf)
        and (row.scope is None or any(_fits(row.scope, outer) for outer in name.scope))
        and (row.without is None or not any(_fits(row.without, outer) for outer in name.scope))
        and (row.parent is None or (bool(name.scope) and _fits(row.parent, name.scope[-1])))
    )


def _letters(layout: str, rank: int) -> str:
    """Spells the star out: "i*o" is "iiio" at rank 4."""
    if "*" not in layout:
        return layout
    before, after = layout.split("*")
    return before[:-1] + before[-1] * (rank - len(before) - len(after) + 1) + after


def _read(row: Row, shape: tuple[int, ...], scan_axis: int) -> MatrixSpec | None:
    """The row's layout on this shape, or None if the ranks or the shape do not fit."""
    assert row.layout is not None
    rank = len(shape)
    layers = 1 if row.stacked and "*" in row.layout else 0
    letters = _letters(row.layout, rank - layers)
    extra = rank - len(letters)
    if extra < 0 or (extra > 1 and scan_axis != 0):
        return None
    if extra and not -rank <= scan_axis < rank:
        return None
    at = scan_axis % rank if extra else 0
    letters = letters[:at] + "b" * extra + letters[at:]
    base = shape[:at] + shape[at + extra :]
    if row.shape is not None and not SHAPES[row.shape](base):
        return None
    reduction = tuple(i for i, letter in enumerate(letters) if letter == "i")
    output = tuple(i for i, letter in enumerate(letters) if letter == "o")
    splits = ()
    if row.parts > 1:
        splits = (Split(output[-1], (shape[output[-1]] // row.parts,) * row.parts),)
    return MatrixSpec(MuonDimensionNumbers(reduction, output), splits)


@lru_cache(maxsize=65536)
def infer_leaf(path: str, shape: tuple[int, ...], scan_axis: int = 0) -> Decision:
    """Decides for one leaf by the table alone.

    Example:
        >>> infer_leaf("decoder/block_0/attention/query/kernel", (768, 12, 64)).spec.dims
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
        >>> infer_leaf("decoder/block_0/attention/query/bias", (12, 64))
        Decision(spec=None, why='bias', unknown=False)
    """
    rank = len(shape)
    if rank < 2:
        return Decision(None, "scalar" if rank == 0 else "vector")
    name = read_path(path)
    stacked = name.stacked or (name.grouped and scan_axis != 0)
    for row in ROWS:
        if not row.rank[0] <= rank <= row.rank[1] or not _names_fit(row, name, stacked):
            continue
        if row.open:
            return Decision(None, row.why, unknown=True)
        if row.layout is None:
            if row.shape is None or SHAPES[row.shape](shape):
                return Decision(None, row.why)
            continue
        spec = _read(row, shape, scan_axis)
        if spec is not None:
            return Decision(spec, row.why)
    return Decision(None, f"no known name, rank {rank}", unknown=True)


def suggested_rule(path: str, rank: int, scan_axis: int = 0) -> str:
    """Writes the rule that a user would add for a leaf that nobody knows.

    Example:
        >>> suggested_rule("decoder/foo/w", 3)
        'MatrixRules([("decoder/foo/w$", MatrixSpec((0, (1, 2))))])'
    """
    letters = "b" * (rank - 3) + "ioo"
    if rank > 3 and 0 <= scan_axis < rank:
        letters = letters[1:]
        letters = letters[:scan_axis] + "b" + letters[scan_axis:]
    reduction = letters.index("i")
    output = tuple(i for i, letter in enumerate(letters) if letter == "o")
    pattern = re.sub(r"\d+", lambda _: r"\d+", re.escape(path).replace(r"\-", "-"))
    prefix = "r" if "\\" in pattern else ""
    return f'MatrixRules([({prefix}"{pattern}$", MatrixSpec(({reduction}, {output})))])'


def unknown_leaves(leaves: Iterable[tuple[str, Sequence[int], str]], scan_axis: int) -> ValueError:
    """Builds the error for leaves of rank three or more that no rule and no row knows.

    Args:
        leaves: Path, shape and reason of each.
        scan_axis: Where stacked layers sit.
    """
    shown: dict[str, str] = {}
    count = 0
    for path, shape, why in leaves:
        count += 1
        shown.setdefault(
            suggested_rule(path, len(shape), scan_axis), f"{path} of shape {tuple(shape)} ({why})"
        )
    lines = [f"  {leaf}: rules={rule}" for rule, leaf in list(shown.items())[:8]]
    return ValueError(
        f"{count} {'leaf' if count == 1 else 'leaves'} of rank three or more cannot be told by "
        "name, so it is open which axes form matrices. Say it by rules, for example:\n"
        + "\n".join(lines)
        + (f"\n  and {len(shown) - 8} more" if len(shown) > 8 else "")
        + "\nThe pair is (reduction axes, output axes), all others are batch axes: "
        "(0, (1, 2)) reads (inputs, heads, head_dim), ((0, 1), 2) reads (heads, head_dim, "
        "outputs), (1, 2) a stack of matrices on axis 0, ((0, 1, 2), 3) a convolution. "
        "None instead of the MatrixSpec leaves the leaf to AdamW."
    )
