"""MatrixRules: which optimizer trains each leaf, and how a leaf is divided into matrices."""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import jax

from muonclip_jax._specs import MatrixSpec, SpecLike, is_spec, normalize_spec, simplify_spec
from muonclip_jax._tree import (
    Tree,
    compile_pattern,
    flatten_with_paths,
    is_masked,
    listed,
    nothing_matched,
)
from muonclip_jax.heads.cuts import ATTENTION
from muonclip_jax.heads.finding import Rule, block_rules, find_blocks, strip_outer
from muonclip_jax.routing.decisions import (
    cut_attention,
    find_output_head,
    find_routers,
    unknown_leaves,
)
from muonclip_jax.routing.inference import infer
from muonclip_jax.routing.leaves import Axes, Decision, Key, Leaf, read_path, read_tree

Rules: TypeAlias = tuple[tuple[str, SpecLike | None], ...]
#: `scan_axis=` as pairs of a pattern and axes; None reads them from the stacks.
ScanAxis: TypeAlias = tuple[tuple[str, Axes], ...] | None

MUON, ADAMW = "muon", "adamw"


@dataclass(frozen=True, init=False)
class MatrixRules:
    """Which optimizer trains each leaf, and how leaves are divided into matrices. Hashable.

    The first matching user rule decides. Without one, routing is inferred from the structure of the
    pytree and from common parameter names (`routing/table.py`).

    With `attention="split"` or "per_head", attention kernels are split into parts, each with its
    own shape scale. The sizes of the parts are inferred from all kernels of a block together, so
    they must all be present; in a masked pytree, those that AdamW trains may be missing. "per_head"
    splits queries, keys, values and gates, but not the output projection.

    Args:
        rules: Pairs of a regular expression, searched in the "/"-joined path, and a `MatrixSpec`,
            `MuonDimensionNumbers` or None (AdamW).
        scan_axis: The parameter axis of stacked layers, as in `variable_axes` of `nn.scan`: an
            axis, a tuple of axes for nested scans, or pairs of a pattern and axes. None infers it
            for each stack.
        attention: "merged": all heads of a projection form one matrix. "split": fused kernels are
            split into queries, keys, values and gates, in latent attention also into rotary and
            other parts. "per_head": every head of each part is a matrix.
        head_dim: Size of a query head, for kernels `(d_model, heads * head_dim)` from which it
            cannot be inferred. Only with "split" or "per_head".
        blocks: Which attention blocks to split, and their layouts, as for `apply_qk_clip`; None
            splits every block with a known layout. Only with "split" or "per_head".

    Raises:
        TypeError: If a rule is not such a pair, `blocks` has an unsupported type, `scan_axis` is
            not an axis, or `head_dim` is not an integer.
        ValueError: If a pattern is not a regular expression, `attention` is unknown, or `head_dim`
            or `blocks` is given with "merged".

    Example:
        >>> import jax
        >>> from muonclip_jax.routing import MatrixSpec
        >>> params = {"stem": {"w": jax.ShapeDtypeStruct((64, 8, 16), "float32")}}
        >>> rules = MatrixRules([("stem/w$", MatrixSpec((0, (1, 2))))])
        >>> rules.labels(params)
        {'stem': {'w': 'muon'}}
        >>> rules.dimension_numbers(params)["stem"]["w"]
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon, splits queries, keys and values;
        GLM-5 Team 2026, arXiv 2602.15763, orthogonalises head by head.
    """

    rules: Rules = ()
    scan_axis: ScanAxis = None
    attention: str = "merged"
    head_dim: int | None = None
    blocks: tuple[Rule, ...] | None = None
    _resolved: tuple[tuple[str, Decision], ...] | None = field(default=None, repr=False)

    def __init__(
        self,
        rules: object = (),
        scan_axis: object = None,
        attention: object = "merged",
        *,
        head_dim: object = None,
        blocks: object = None,
    ):
        if attention not in ATTENTION:
            raise ValueError(
                f"attention must be one of {', '.join(map(repr, ATTENTION))}, got {attention!r}. "
                "It determines how attention kernels are split into matrices."
            )
        if head_dim is not None and (isinstance(head_dim, bool) or not isinstance(head_dim, int)):
            raise TypeError(f"head_dim must be an integer such as 64, got {head_dim!r}.")
        if attention == "merged" and (head_dim, blocks) != (None, None):
            given = "head_dim" if blocks is None else "blocks"
            raise ValueError(
                f"{given}= determines how attention kernels are split, and with "
                "attention='merged' they are not. Leave it out, or write attention='split' or "
                "attention='per_head'."
            )
        values = {
            "rules": () if rules == () else _checked_rules(rules),
            "scan_axis": None if scan_axis is None else _checked_scan_axis(scan_axis),
            "attention": attention,
            "head_dim": head_dim,
            "blocks": block_rules(blocks),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def decisions(self, params: Tree) -> list[tuple[str, Any, Decision]]:
        """Returns the decision for every leaf, in flattening order, or an error."""
        if self._resolved is not None:
            known = dict(self._resolved)
            return [(path, x, known[path]) for path, x in flatten_with_paths(params)[0]]
        leaves = read_tree(params)
        nodes = flatten_with_paths(params, is_leaf=is_masked)[0]
        hidden = frozenset(path for path, node in nodes if is_masked(node))
        decided = _decide(self, tuple(key for key, _ in leaves), hidden)
        return [(key[0], x, found) for (key, x), found in zip(leaves, decided, strict=True)]

    def resolve(self, params: Tree) -> "MatrixRules":
        """Returns rules with the decisions for a whole tree, for its parts, which show less."""
        self.check_all_matched(params)
        resolved = copy.copy(self)
        decided = tuple((path, found) for path, _, found in self.decisions(params))
        object.__setattr__(resolved, "_resolved", decided)
        return resolved

    def labels(self, params: Tree) -> Tree:
        """Returns a pytree of "muon" and "adamw" (see `label_params`)."""
        decided = self.decisions(params)
        self.check_all_matched(params)
        labels = [ADAMW if decision.spec is None else MUON for _, _, decision in decided]
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    def dimension_numbers(self, params: Tree) -> Tree:
        """Returns a pytree of matrix axes (see `infer_dimension_numbers`)."""
        specs = [decision.spec for _, _, decision in self.decisions(params)]
        leaves = [None if spec is None else simplify_spec(spec) for spec in specs]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def check_all_matched(self, params: Tree) -> None:
        """Raises if a whole tree has no leaf for a rule, or no attention to split."""
        nodes = flatten_with_paths(params, is_leaf=is_masked)[0]
        if not nodes or self._resolved is not None or any(is_masked(node) for _, node in nodes):
            return
        paths = [path for path, _ in nodes]
        for pattern, _ in self.rules:
            if not any(re.search(pattern, path) for path in paths):
                raise nothing_matched("The rule", pattern, paths)
        if self.attention == "merged":
            return
        leaves = {strip_outer(path): leaf for path, leaf in nodes}
        if not any(block.selected for block in find_blocks(leaves, self.blocks)):
            raise ValueError(
                f"attention={self.attention!r} found no attention block among {listed(paths)}. "
                "Give the names of its projections, by blocks=[(pattern, AttentionLayout(...))], "
                "or leave attention out."
            )


@lru_cache(maxsize=64)
def _decide(
    rules: MatrixRules, keys: tuple[Key, ...], hidden: frozenset[str]
) -> tuple[Decision, ...]:
    """Decides by rules, tree and attention layouts; the leaves at `hidden` are masked."""
    leaves: list[Leaf] = []
    for key in keys:
        path, shape, trained, _ = key
        ruled = None
        rule = next((rule for rule in rules.rules if re.search(rule[0], path)), None)
        if rule is not None:
            pattern, spec = rule
            if spec is not None and not trained:
                raise ValueError(
                    f"{path} of shape {shape} has an integer or bool dtype, and rule {pattern!r} "
                    f"assigns it to Muon. Leave it out of the tree, or write ({pattern!r}, None)."
                )
            ruled = Decision(spec and normalize_spec(spec, shape, path), f"rule {pattern!r}")
        stack = (axes for pattern, axes in rules.scan_axis or () if re.search(pattern, path))
        leaves.append(Leaf(*key, *read_path(path), ruled, next(stack, None)))
    infer(leaves, hidden)
    find_routers(leaves)
    find_output_head(leaves)
    if rules.attention != "merged":
        cut_attention(leaves, hidden, rules.attention, rules.head_dim, rules.blocks)
    for leaf in leaves:
        if leaf.ruled is not None:
            spec, found = leaf.ruled.spec, leaf.decision.spec
            turned = spec and found and spec.dims == found.dims[::-1]
            leaf.decision = dataclasses.replace(
                leaf.ruled,
                decays=spec is not None or leaf.decision.decays,
                flag="transposed: without the rule its axes are exchanged" * bool(turned),
                cure=found if turned else None,
            )
    if any(leaf.decision.readings for leaf in leaves):
        raise unknown_leaves([(leaf.path, leaf.shape, leaf.decision) for leaf in leaves])
    return tuple(leaf.decision for leaf in leaves)


def as_rules(rules: object) -> MatrixRules:
    """The rules given, or the default ones for None; a TypeError for anything else."""
    if rules is None:
        return MatrixRules()
    if not isinstance(rules, MatrixRules):
        raise TypeError(
            f"rules must be a MatrixRules, got {rules!r}. Write MatrixRules({rules!r})."
        )
    return rules


def _checked_rules(rules: object) -> Rules:
    """The rules in a form that can be hashed."""
    rules = rules.items() if isinstance(rules, Mapping) else rules
    entries = rules if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]
    checked: list[tuple[str, SpecLike | None]] = []
    for rule in entries:
        pair = rule if isinstance(rule, tuple | list) else ()
        if len(pair) != 2 or not (pair[1] is None or is_spec(pair[1])):
            raise TypeError(
                "rules must be a list of pairs (pattern, spec) with a MatrixSpec, a "
                f"MuonDimensionNumbers or None (AdamW), got {rule!r}. Write, for example, "
                'MatrixRules([("foo/w$", MatrixSpec((0, 1))), ("embed$", None)]).'
            )
        pattern, spec = pair
        compile_pattern(pattern)
        # Optax allows lists of axes, which cannot be hashed.
        keep = spec is None or isinstance(spec, MatrixSpec)
        checked.append((pattern, spec if keep else MatrixSpec(spec).dims))
    return tuple(checked)


def _checked_scan_axis(scan_axis: object) -> ScanAxis:
    """`scan_axis=` as pairs of a pattern and axes."""
    pairs = scan_axis if isinstance(scan_axis, tuple | list) else [scan_axis]
    if not any(isinstance(pair, tuple | list) for pair in pairs):
        pairs = [("", pairs)]
    checked: list[tuple[str, tuple[int, ...]]] = []
    for pair in pairs:
        pattern, axes = pair if isinstance(pair, tuple | list) and len(pair) == 2 else ("", None)
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        whole = tuple(x for x in axes if isinstance(x, int) and not isinstance(x, bool))
        if not axes or len(whole) < len(axes):
            raise TypeError(
                "scan_axis must be an integer such as 0 or 1, a tuple of them for nested scans, or "
                f"pairs (pattern, axes), got {scan_axis!r}: it is the parameter axis of "
                "stacked layers. None infers it from the stack."
            )
        compile_pattern(pattern)
        checked.append((pattern, whole))
    return tuple(checked)
