"""Trees of specs laid beside trees of parameters, by path.

A user may give one spec for all leaves, a tree of specs, or a function that makes one. The tree may
be a prefix ("all of `decoder` like this"), may say None ("not this one"), and may hold masked
nodes where `optax.masked` or `optax.multi_transform` cut leaves out of either tree. Paths decide
what belongs together, so boxes and containers need not agree.
"""

import re
from typing import Any, TypeAlias

from muonclip_jax._specs import MatrixSpec, is_spec, normalize_spec
from muonclip_jax._tree import (
    Tree,
    array_leaves,
    flatten_with_paths,
    is_masked,
    nothing_matched,
    tree_from,
)
from muonclip_jax.routing.layouts import possible_layouts
from muonclip_jax.routing.rules import MatrixRules, as_rules
from muonclip_jax.routing.suggestions import write_rule

#: What `weight_dimension_numbers` may be.
SpecTree: TypeAlias = Any


def resolve_specs(
    params: Tree,
    weight_dimension_numbers: SpecTree | None = None,
    rules: MatrixRules | None = None,
) -> list[tuple[str, Any, MatrixSpec | None]]:
    """Finds the spec of every leaf of `params`.

    Args:
        params: The tree of parameters, or a masked one; only shapes are looked at.
        weight_dimension_numbers: None (the rules decide); one `MatrixSpec` or
            `MuonDimensionNumbers` for all leaves; a tree of them with None for leaves that AdamW
            trains, which may be a prefix of `params` or masked; or a function from `params` to one
            of these.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        `(path, leaf, spec)` of every leaf, in the order in which `params` flattens. The specs are
        normalised.

    Raises:
        TypeError: If an entry of the tree is no spec.
        ValueError: If a leaf has no entry, an entry has no leaf, or a spec does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w1": {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}, "w2": jnp.ones((4, 4))}
        >>> specs = resolve_specs(params, {"w1": MatrixSpec(), "w2": None})
        >>> [(path, spec is not None) for path, _, spec in specs]
        [('w1/a', True), ('w1/b', True), ('w2', False)]
    """
    weight_dimension_numbers = spec_tree(weight_dimension_numbers, params)
    if weight_dimension_numbers is None:
        decided = as_rules(rules).decisions(params)
        return [(path, leaf, decision.spec) for path, leaf, decision in decided]

    leaves = array_leaves(params)
    if is_spec(weight_dimension_numbers):
        return [
            (path, leaf, normalize_spec(weight_dimension_numbers, leaf.shape, path))
            for path, leaf in leaves
        ]

    entries = _entries(weight_dimension_numbers)
    used: set[str] = set()
    resolved = []
    for path, leaf in leaves:
        entry = _covering(path, entries)
        if entry is None or is_masked(entries[entry]):
            raise ValueError(
                f"{path} of shape {tuple(leaf.shape)} has no entry in weight_dimension_numbers"
                f"{' (it is masked there)' if entry is not None else ''}, whose entries are "
                f"{', '.join(map(repr, list(entries)[:8])) or 'none'}. Give it, or a subtree that "
                "holds it, a MatrixSpec or MuonDimensionNumbers, or None where AdamW trains it."
            )
        used.add(entry)
        spec = entries[entry]
        resolved.append(
            (path, leaf, None if spec is None else normalize_spec(spec, leaf.shape, path))
        )
    _check_all_used(params, entries, used)
    return resolved


def spec_tree(given: SpecTree | None, params: Tree) -> SpecTree | None:
    """The tree of specs that is given as it is or as a function of the parameters."""
    return tree_from(given, params, _is_entry)


def resolve_muon_specs(
    params: Tree,
    weight_dimension_numbers: SpecTree | None = None,
    rules: MatrixRules | None = None,
) -> list[tuple[str, Any, MatrixSpec]]:
    """Finds the matrices of every leaf of a tree that Muon trains as a whole.

    Where nothing says otherwise, a leaf of two axes is a matrix.

    Args:
        params: The tree of parameters, or a masked one; only shapes are looked at.
        weight_dimension_numbers: As in `resolve_specs`.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        `(path, leaf, spec)` of every leaf, in the order in which `params` flattens. The specs are
        normalised.

    Raises:
        TypeError: If an entry of the tree is no spec.
        ValueError: As in `resolve_specs`; also if a leaf has fewer than two axes, or more and no
            spec.

    Example:
        >>> import jax.numpy as jnp
        >>> [(path, _, spec)] = resolve_muon_specs({"embed": jnp.ones((9, 4))})
        >>> spec.dims
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1,))
    """
    resolved = resolve_specs(params, weight_dimension_numbers, rules)
    return [(path, leaf, _as_matrix(path, leaf, spec)) for path, leaf, spec in resolved]


def _as_matrix(path: str, leaf: Any, spec: MatrixSpec | None) -> MatrixSpec:
    shape = tuple(leaf.shape)
    if len(shape) < 2:
        raise ValueError(
            f"{path or 'The leaf'} of shape {shape} is a rank-{len(shape)} leaf under Muon, which "
            "needs matrices. Route it to AdamW, for example by optax.multi_transform with "
            "label_params, or use muonclip(...), which routes by itself."
        )
    if spec is not None:
        return spec
    if len(shape) == 2:
        return normalize_spec(MatrixSpec(), shape, path)
    pattern = f"^{re.escape(path)}$"
    choices = "\n".join(f"  rules={write_rule(pattern, x)}" for x in possible_layouts(shape))
    raise ValueError(
        f"{path or 'The leaf'} of shape {shape} reached Muon, and nothing says which of its axes "
        f"form matrices. Route it to AdamW by label_params, or pass one of\n{choices}"
    )


def _entries(tree: Any) -> dict[str, Any]:
    """The tree's specs, Nones and masked nodes by path."""
    pairs = flatten_with_paths(tree, is_leaf=_is_entry)[0]
    for path, entry in pairs:
        if not _is_entry(entry):
            raise TypeError(
                f"weight_dimension_numbers has {entry!r} at {path or 'its root'!r}; entries must "
                "be MatrixSpec, MuonDimensionNumbers or None. Write MatrixSpec((0, 1)) for a pair "
                "of axes."
            )
    return dict(pairs)


def _is_entry(x: Any) -> bool:
    return x is None or is_spec(x) or is_masked(x)


def _covering(path: str, paths: Any) -> str | None:
    """The longest of `paths` that is `path` or a container of it."""
    while path not in paths:
        if not path:
            return None
        path = path.rpartition("/")[0]
    return path


def _check_all_used(params: Tree, entries: dict[str, Any], used: set[str]) -> None:
    """Raises for an entry that belongs to no leaf, unless the leaf is masked or None here."""
    absent = [
        path
        for path, node in flatten_with_paths(params, is_leaf=lambda x: x is None or is_masked(x))[0]
        if node is None or is_masked(node)
    ]
    for path, entry in entries.items():
        if path in used or is_masked(entry):
            continue
        if _covering(path, absent) is None and not any(
            not path or hole.startswith(path + "/") for hole in absent
        ):
            paths = [path for path, _ in flatten_with_paths(params)[0]]
            raise nothing_matched("The entry of weight_dimension_numbers at", path, paths)
