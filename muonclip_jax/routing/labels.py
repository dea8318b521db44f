"""Results of the rules for a whole tree: labels, dimension numbers, decay, and a printed table."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from muonclip_jax._specs import (
    MatrixSpec,
    is_spec,
    matrix_shapes,
    normalize_spec,
    normalized_axes,
    write_rule,
)
from muonclip_jax._tree import (
    Tree,
    array_leaves,
    containers,
    flatten_with_paths,
    is_masked,
    listed,
    nothing_matched,
    pattern_for,
    tree_from,
)
from muonclip_jax.routing.decisions import unknown_leaves
from muonclip_jax.routing.leaves import Decision, possible_layouts
from muonclip_jax.routing.rules import ADAMW, MUON, MatrixRules, as_rules


def label_params(params: Tree, rules: MatrixRules | None = None) -> Tree:
    """Labels every leaf "muon" or "adamw", for use in `optax.multi_transform`.

    Args:
        params: The parameters; only shapes are used.
        rules: A `MatrixRules`; None means `MatrixRules()`.

    Returns:
        A pytree of strings with the structure of `params`. Where that is callable, as an Equinox
        module is, give `optax.multi_transform` the function `label_params` and not its result.

    Raises:
        ValueError: If a leaf of rank three or more is not recognised, or a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> label_params({"embed": jnp.ones((50, 8)), "dense": {"kernel": jnp.ones((8, 8))}})
        {'dense': {'kernel': 'muon'}, 'embed': 'adamw'}

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982.
    """
    return as_rules(rules).labels(params)


def infer_dimension_numbers(params: Tree, rules: MatrixRules | None = None) -> Tree:
    """Returns the matrix axes of every leaf; None for a leaf that AdamW trains.

    If no kernel is split, `optax.contrib.muon` accepts it as `muon_weight_dimension_numbers` too.

    Args:
        params: The parameters, or a masked or partial pytree of them; only shapes are used.
        rules: A `MatrixRules`; None means `MatrixRules()`.

    Returns:
        A pytree of `optax.contrib.MuonDimensionNumbers`, `MatrixSpec` (for split kernels) or None.

    Raises:
        ValueError: If a leaf of rank three or more is not recognised.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"attention": {"query": {"kernel": jnp.ones((8, 2, 4))}}}
        >>> infer_dimension_numbers(params)["attention"]["query"]["kernel"]
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """
    return as_rules(rules).dimension_numbers(params)


def describe_labels(params: Tree, rules: MatrixRules | None = None) -> str:
    """Returns a table of path, shape, label, matrices and reason of every leaf.

    Args:
        params: The parameters; only shapes are used.
        rules: A `MatrixRules`; None means `MatrixRules()`.

    Returns:
        The table, counts of leaves and parameters, and a line with a rule for each leaf marked
        "check": trained by Muon, it may be an output layer or an embedding table, or a rule
        exchanges its input and output axes. Of square matrices the axes are shown: input->output.

    Raises:
        ValueError: If a leaf of rank three or more is not recognised, or a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> up, down = jnp.ones((8, 6, 32)), jnp.ones((32, 6, 8))
        >>> layers = {"wi": {"kernel": up}, "wo": {"kernel": down}}
        >>> params = {"layers": layers, "fc": jnp.ones((8, 2))}
        >>> print(describe_labels(params))
        path              shape       label  matrices     why
        fc                (8, 2)      muon   (8, 2)       matrix  <- check
        layers/wi/kernel  (8, 6, 32)  muon   6 x (8, 32)  stacked matrices
        layers/wo/kernel  (32, 6, 8)  muon   6 x (32, 8)  stacked matrices
        <BLANKLINE>
        muon: 3 leaves, 3,088 numbers (100.0 %); adamw: 0 leaves, 0 numbers (0.0 %)
        check: fc may be the output layer; MatrixRules([("^fc$", None)]) leaves it to AdamW
    """
    rules = as_rules(rules)
    decided = rules.decisions(params)
    rules.check_all_matched(params)
    rows, checks = [("path", "shape", "label", "matrices", "why")], list[str]()
    sizes: dict[str, list[int]] = {MUON: [], ADAMW: []}
    for path, leaf, decision in decided:
        shape, spec = tuple(leaf.shape), decision.spec
        parts = () if spec is None else matrix_shapes(spec, shape)
        matrices = " + ".join(f"{n} x ({m}, {k})".removeprefix("1 x ") for n, m, k in parts)
        if spec is not None:
            (first, *more), (last, *others) = normalized_axes(spec)
            if not (more or others) and shape[first] == shape[last]:
                matrices += f" {first}->{last}"  # the shape does not show it
        label = ADAMW if spec is None else MUON
        sizes[label].append(math.prod(shape))
        mark = "  <- check" if decision.flag else ""
        rows.append((path, str(shape), label, matrices, decision.why + mark))
        if mark:
            rule = write_rule(pattern_for([path], ()), decision.cure)
            rule += " says so" if decision.cure else " leaves it to AdamW"
            checks.append(f"check: {path} may be {decision.flag}; {rule}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    total = max(1, sum(map(sum, sizes.values())))
    counts = "; ".join(
        f"{label}: {len(found)} {'leaf' if len(found) == 1 else 'leaves'}, {sum(found):,} numbers "
        f"({100 * sum(found) / total:.1f} %)"
        for label, found in sizes.items()
    )
    return "\n".join([*lines, "", counts, *checks])


def decay_mask(params: Tree, rules: MatrixRules | None = None) -> Tree:
    """Returns the same tree of bools: True where weight decay applies.

    Norms, gains, biases and other vectors do not decay, stacked or not, as in Kimi K2.
    """
    decided = as_rules(rules).decisions(params)
    decays = [decision.spec is not None or decision.decays for _, _, decision in decided]
    return jax.tree.unflatten(jax.tree.structure(params), decays)


def route_once(
    build: Callable[[optax.Params], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation from the whole tree, of which a masked one shows less."""

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        tx = optax.with_extra_args_support(build(updates if params is None else params))
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(
        lambda params: build(params).init(params), update_fn
    )


def spec_tree(given: Tree, params: Tree) -> Tree:
    """The tree of specs, which may be given as a function of the parameters."""
    return tree_from(given, params, _is_entry)


def resolve_specs(
    params: Tree, weight_dimension_numbers: Tree = None, rules: MatrixRules | None = None
) -> list[tuple[str, Any, MatrixSpec | None]]:
    """Finds the spec of every leaf of `params`, by the rules without `weight_dimension_numbers`.

    None is a leaf that AdamW trains. The tree of specs may be a prefix, and either tree may contain
    masked nodes. Leaves are matched by path, so boxes and containers may differ.
    """
    given = spec_tree(weight_dimension_numbers, params)
    if given is None:
        decided = as_rules(rules).decisions(params)
        return [(path, leaf, decision.spec) for path, leaf, decision in decided]
    entries = dict(flatten_with_paths(given, is_leaf=_is_entry)[0])
    for path, entry in entries.items():
        if not _is_entry(entry):
            raise TypeError(
                f"weight_dimension_numbers has {entry!r} at {path or 'its root'!r}; entries must "
                "be MatrixSpec, MuonDimensionNumbers or None. Write MatrixSpec((0, 1)) for a pair "
                "of axes."
            )
    resolved: list[tuple[str, Any, MatrixSpec | None]] = []
    for path, leaf in array_leaves(params):
        spec = next((entries[x] for x in containers(path) if x in entries), ...)
        if spec is ... or is_masked(spec):
            raise ValueError(
                f"{path} of shape {tuple(leaf.shape)} has no entry in weight_dimension_numbers"
                f"{' (it is masked there)' if is_masked(spec) else ''}, whose entries are "
                f"{listed(entries)}. Give it, or a subtree that holds it, a MatrixSpec or "
                "MuonDimensionNumbers, or None where AdamW trains it."
            )
        resolved.append((path, leaf, spec and normalize_spec(spec, leaf.shape, path)))
    nodes = flatten_with_paths(params, is_leaf=lambda x: x is None or is_masked(x))[0]
    absent = {path for path, node in nodes if node is None or is_masked(node)}
    known = {"", *(container for path, _ in nodes for container in containers(path))}
    for path, entry in entries.items() if resolved else ():  # none in optax's placeholder
        if not (path in known or is_masked(entry) or absent.intersection(containers(path))):
            raise nothing_matched(
                "The entry of weight_dimension_numbers at", path, [path for path, _, _ in resolved]
            )
    return resolved


def resolve_muon_specs(
    params: Tree, weight_dimension_numbers: Tree = None, rules: MatrixRules | None = None
) -> list[tuple[str, Any, MatrixSpec]]:
    """As `resolve_specs`, for a tree in which Muon trains every leaf; one of rank 2 is a matrix."""
    found: list[tuple[str, Any, MatrixSpec]] = []
    for path, leaf, spec in resolve_specs(params, weight_dimension_numbers, rules):
        shape = tuple(leaf.shape)
        if len(shape) < 2:
            raise ValueError(
                f"{path or 'The leaf'} of shape {shape} is a rank-{len(shape)} leaf under Muon, "
                "which needs matrices. Route it to AdamW, for example by optax.multi_transform "
                "with label_params, or use muonclip(...), which does this automatically."
            )
        rule = next((x for x in rules.rules if re.search(x[0], path)), None) if rules else None
        if rule is not None and spec is rule[1] is None:
            raise ValueError(
                f"{path} of shape {shape} is under Muon, and rule {rule[0]!r} gives it to AdamW. "
                "Labels need the same rules: functools.partial(label_params, rules=rules)."
            )
        if spec is None and len(shape) > 2:
            why, readings = "assigned to Muon, but not by the rules", tuple(possible_layouts(shape))
            raise unknown_leaves([(path, shape, Decision(None, why, readings=readings))])
        found.append((path, leaf, spec or normalize_spec(MatrixSpec(), shape, path)))
    return found


def _is_entry(x: object) -> bool:
    return x is None or is_spec(x) or is_masked(x)
