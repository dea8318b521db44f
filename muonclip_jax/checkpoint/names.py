"""Which parameter a leaf of a state belongs to, by its path."""

from collections.abc import Collection

from muonclip_jax._tree import SEPARATOR


def owner_of(path: str, params: Collection[str]) -> str | None:
    """Returns the parameter whose path ends `path`, the longest where there are several.

    Args:
        path: Of a leaf in a state.
        params: The paths of the parameters.

    Returns:
        The parameter's path; None where the leaf belongs to none. A last "value" is looked
        through: it is the box that a checkpoint without a target shows as a dict.

    Example:
        >>> owner_of("0/mu/dense/kernel", {"kernel", "dense/kernel"})
        'dense/kernel'
        >>> owner_of("0/count", {"kernel", "dense/kernel"}) is None
        True
    """
    for ending in (path, path.removesuffix(SEPARATOR + "value")):
        rest = ending
        while SEPARATOR in rest:
            rest = rest.partition(SEPARATOR)[2]
            if rest in params:
                return rest
    return None


def without_box(path: str) -> str:
    """Returns `path` without the "value" of a box at its end.

    Example:
        >>> without_box("dense/kernel/value")
        'dense/kernel'
    """
    return path.removesuffix(SEPARATOR + "value")
