"""MatrixRules: one value that decides for every leaf how it becomes matrices and who trains it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from muonclip_jax._paths import compile_pattern, flatten_with_paths, nothing_matched
from muonclip_jax._typing import Tree
from muonclip_jax.layouts.fitting import normalize_spec, simplify_spec
from muonclip_jax.layouts.inference import Decision, infer_leaf, unknown_leaves
from muonclip_jax.layouts.specs import SpecLike, hashable_spec, is_spec

MUON = "muon"
ADAMW = "adamw"


@dataclass(frozen=True, init=False)
class MatrixRules:
    """How leaves become matrices and who trains them; hashable, so it may be a static argument.

    A leaf is decided by its path and its shape alone. The user's rules come first, the first one
    that matches wins; then names that the libraries share decide (`layouts/table.py`).

    Args:
        rules: Pairs of a regular expression, searched in the "/"-joined path, and a `MatrixSpec`,
            `MuonDimensionNumbers` or None (AdamW).
        scan_axis: The parameter axis that holds stacked layers, the `variable_axes` of `nn.scan`.
            It cannot be told from shapes.

    Raises:
        TypeError: If a rule is no such pair, or `scan_axis` no integer.
        ValueError: If a pattern is no regular expression.

    Example:
        >>> import jax
        >>> from muonclip_jax.layouts import MatrixSpec
        >>> params = {"stem": {"w": jax.ShapeDtypeStruct((64, 8, 16), "float32")}}
        >>> rules = MatrixRules([("stem/w$", MatrixSpec((0, (1, 2))))])
        >>> rules.labels(params)
        {'stem': {'w': 'muon'}}
        >>> rules.dimension_numbers(params)["stem"]["w"]
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """

    rules: tuple[tuple[str, SpecLike | None], ...] = ()
    scan_axis: int = 0

    def __init__(self, rules: Any = (), scan_axis: Any = 0):
        if isinstance(scan_axis, bool) or not isinstance(scan_axis, int):
            raise TypeError(
                f"scan_axis must be an integer such as 0 or 1, got {scan_axis!r}: it is the "
                "parameter axis that holds stacked layers."
            )
        object.__setattr__(self, "rules", tuple(_check_rule(rule) for rule in _pairs(rules)))
        object.__setattr__(self, "scan_axis", scan_axis)

    def decide(self, path: str, shape: tuple[int, ...]) -> Decision:
        """Decides for one leaf; the spec, where there is one, is normalised."""
        for pattern, spec in self.rules:
            if re.search(pattern, path):
                why = f"rule {pattern!r}"
                if spec is None:
                    return Decision(None, why)
                return Decision(normalize_spec(spec, shape, path), why)
        return infer_leaf(path, shape, self.scan_axis)

    def decisions(self, params: Tree) -> list[tuple[str, Any, Decision]]:
        """Decides for every leaf, in the order in which `params` flattens.

        Raises:
            ValueError: If a leaf of rank three or more is not known.
        """
        leaves = flatten_with_paths(params)[0]
        decided = [(path, leaf, self.decide(path, tuple(leaf.shape))) for path, leaf in leaves]
        unknown = [(path, leaf.shape, d.why) for path, leaf, d in decided if d.unknown]
        if unknown:
            raise unknown_leaves(unknown, self.scan_axis)
        return decided

    def labels(self, params: Tree) -> Tree:
        """The same tree of "muon" and "adamw".

        Args:
            params: The tree of parameters; only shapes are looked at.

        Raises:
            ValueError: If a leaf of rank three or more is not known, or a rule matches nothing.
        """
        decided = self.decisions(params)
        self.check_all_matched(params)
        labels = [ADAMW if decision.spec is None else MUON for _, _, decision in decided]
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    def dimension_numbers(self, params: Tree) -> Tree:
        """The same tree of `MuonDimensionNumbers`, `MatrixSpec` (where split) or None.

        Args:
            params: The tree of parameters, or a masked or partial one.

        Raises:
            ValueError: If a leaf of rank three or more is not known.
        """
        specs = [decision.spec for _, _, decision in self.decisions(params)]
        leaves = [None if spec is None else simplify_spec(spec) for spec in specs]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def check_all_matched(self, params: Tree) -> None:
        """Raises if a rule matches no leaf of a full tree.

        A masked tree is partial, and `optax.tree.map_params` calls `init` with an empty one: they
        are not asked.
        """
        nodes = jax.tree.leaves(params, is_leaf=is_masked)
        if not nodes or any(is_masked(node) for node in nodes):
            return
        paths = [path for path, _ in flatten_with_paths(params)[0]]
        for pattern, _ in self.rules:
            if not any(re.search(pattern, path) for path in paths):
                raise nothing_matched("The rule", pattern, paths)


def label_params(params: Tree, rules: MatrixRules | None = None) -> Tree:
    """Labels every leaf "muon" or "adamw"; `optax.multi_transform` takes it as it is.

    Args:
        params: The tree of parameters; only shapes are looked at.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        The same tree of strings.

    Raises:
        ValueError: If a leaf of rank three or more is not known, or a rule matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> label_params({"embed": jnp.ones((50, 8)), "dense": {"kernel": jnp.ones((8, 8))}})
        {'dense': {'kernel': 'muon'}, 'embed': 'adamw'}

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982.
    """
    return as_rules(rules).labels(params)


def infer_dimension_numbers(params: Tree, rules: MatrixRules | None = None) -> Tree:
    """Says for every leaf which axes form its matrices; None is a leaf that AdamW trains.

    Optax's own `optax.contrib.muon` takes it as `muon_weight_dimension_numbers` wherever no kernel
    is split.

    Args:
        params: The tree of parameters, or a masked or partial one; only shapes are looked at.
        rules: A `MatrixRules`; None is `MatrixRules()`.

    Returns:
        The same tree of `optax.contrib.MuonDimensionNumbers`, `MatrixSpec` (where a fused kernel
        is split) or None.

    Raises:
        ValueError: If a leaf of rank three or more is not known.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"attention": {"query": {"kernel": jnp.ones((8, 2, 4))}}}
        >>> infer_dimension_numbers(params)["attention"]["query"]["kernel"]
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    """
    return as_rules(rules).dimension_numbers(params)


def as_rules(rules: Any) -> MatrixRules:
    """The rules given, or the default ones for None.

    Raises:
        TypeError: If `rules` is no `MatrixRules`.
    """
    if rules is None:
        return MatrixRules()
    if not isinstance(rules, MatrixRules):
        raise TypeError(
            f"rules must be a MatrixRules, got {rules!r}. Write MatrixRules({rules!r})."
        )
    return rules


def is_masked(x: Any) -> bool:
    """Tells the node that Optax leaves where a leaf was masked out.

    Example:
        >>> is_masked(optax.MaskedNode()), is_masked(None)
        (True, False)
    """
    return isinstance(x, optax.MaskedNode)


def _pairs(rules: Any) -> Iterable[Any]:
    if isinstance(rules, dict):
        return tuple(rules.items())
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(
            f"rules must be a list of (pattern, spec) pairs, got {rules!r}. Write, for example, "
            'MatrixRules([("foo/w$", MatrixSpec((0, 1)))]).'
        )
    return tuple(rules)


def _check_rule(rule: Any) -> tuple[str, SpecLike | None]:
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        raise TypeError(
            f"A rule must be a pair (pattern, spec), got {rule!r}. Write, for example, "
            '("foo/w$", MatrixSpec((0, 1))), or ("foo/w$", None) for AdamW.'
        )
    pattern, spec = rule
    if not isinstance(pattern, str):
        raise TypeError(
            f"A rule's pattern must be a string such as 'query/kernel$', got {pattern!r}."
        )
    compile_pattern(pattern)
    if spec is not None and not is_spec(spec):
        raise TypeError(
            f"The rule for {pattern!r} must give a MatrixSpec, MuonDimensionNumbers or None, got "
            f"{spec!r}. Write, for example, MatrixSpec((0, 1))."
        )
    return pattern, None if spec is None else hashable_spec(spec)
