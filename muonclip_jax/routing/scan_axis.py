"""`MatrixRules(scan_axis=)`: an axis, axes of nested scans, or pairs of a pattern and axes."""

import re
from typing import Any

from muonclip_jax._tree import compile_pattern

#: Axes of stacked layers.
Axes = tuple[int, ...]
#: What `scan_axis=` is, once checked; None reads it from the stacks.
ScanAxis = int | Axes | tuple[tuple[str, Axes], ...] | None


def check_scan_axis(scan_axis: Any) -> Any:
    """Returns `scan_axis=` in a form that can be hashed.

    Raises:
        TypeError: If it is no axis, no tuple of axes and no list of pairs (pattern, axes).

    Example:
        >>> check_scan_axis([("encoder", 0), ("decoder", [1, 2])])
        (('encoder', (0,)), ('decoder', (1, 2)))
    """
    if scan_axis is None or _is_axis(scan_axis):
        return scan_axis
    if isinstance(scan_axis, tuple | list) and scan_axis:
        if all(map(_is_axis, scan_axis)):
            return tuple(scan_axis)
        if all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in scan_axis):
            pairs = tuple((pattern, check_scan_axis(axes)) for pattern, axes in scan_axis)
            if all(axes is not None for _, axes in pairs):
                for pattern, _ in pairs:
                    compile_pattern(pattern)
                return tuple((p, (a,) if isinstance(a, int) else a) for p, a in pairs)
    raise TypeError(
        f"scan_axis must be an integer such as 0 or 1, a tuple of them for nested scans, or pairs "
        f"(pattern, axes), got {scan_axis!r}: it is the parameter axis that holds stacked layers. "
        "None reads it from the stack."
    )


def _is_axis(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def given_axes(scan_axis: ScanAxis, path: str) -> Axes | None:
    """The axes that the user names for a leaf."""
    if scan_axis is None or isinstance(scan_axis, int):
        return None if scan_axis is None else (scan_axis,)
    for pair in scan_axis:
        if isinstance(pair, int):
            return tuple(axis for axis in scan_axis if isinstance(axis, int))
        if re.search(pair[0], path):
            return pair[1]
    return None


def allowed(given: Axes | None, choices: list[Axes], extra: int, rank: int) -> list[Axes]:
    """Those choices that the user allows: the named axes, or more of them in nested stacks."""
    if given is None:
        return choices
    if any(not -rank <= axis < rank for axis in given[:extra]):
        return []
    if len(given) >= extra:
        return [given[:extra]]
    if given == (0,):
        return [tuple(range(extra))]
    wanted = {axis % rank for axis in given}
    return [axes for axes in choices if axes[0] >= 0 and wanted <= set(axes)]
