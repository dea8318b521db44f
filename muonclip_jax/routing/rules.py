"""MatrixRules: one value that decides for every leaf how it becomes matrices and who trains it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from muonclip_jax._specs import MatrixSpec, SpecLike, is_spec, simplify_spec
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
from muonclip_jax.routing.decisions import Rules, decide
from muonclip_jax.routing.inference import Decision
from muonclip_jax.routing.leaves import read_tree
from muonclip_jax.routing.stacks import ScanAxis

MUON, ADAMW = "muon", "adamw"


@dataclass(frozen=True, init=False)
class MatrixRules:
    """How leaves become matrices and who trains them; hashable, so it may be a static argument.

    The user's rules come first, the first one that matches wins; then what the tree shows, and
    names that the libraries share (`routing/table.py`).

    With `attention="split"` or "per_head" the kernels of attention blocks are cut further, each
    part with the scale of its own shape. Sizes of parts show only in a block as a whole, so the
    kernels of one block must be there together; of a masked tree those that AdamW trains may be
    missing. "per_head" cuts queries, keys, values and gates, not the output projection.

    Args:
        rules: Pairs of a regular expression, searched in the "/"-joined path, and a `MatrixSpec`,
            `MuonDimensionNumbers` or None (AdamW).
        scan_axis: The parameter axis that holds stacked layers, the `variable_axes` of `nn.scan`:
            an axis, a tuple of axes for nested scans, or pairs of a pattern and axes. None reads it
            from each stack.
        attention: "merged": all heads of a projection are one matrix; "split": fused kernels fall
            into queries, keys, values and gates, those of latent attention also into the parts
            with and without rotation and into latent and shared key; "per_head": every head of
            each of those is a matrix.
        head_dim: Features of one query head, where kernels `(d_model, heads * head_dim)` do not
            show it. Only with `attention`.
        blocks: Which attention blocks to cut and what their layouts are, as for `apply_qk_clip`;
            None is every block with a known layout. Only with `attention`.

    Raises:
        TypeError: If a rule is no such pair, `blocks` is not what it can be, `scan_axis` is no
            axis, or `head_dim` is no integer.
        ValueError: If a pattern is no regular expression, `attention` is unknown, or `head_dim` or
            `blocks` is given without it.

    Example:
        >>> import jax
        >>> from muonclip_jax.routing import MatrixSpec
        >>> params = {"stem": {"w": jax.ShapeDtypeStruct((64, 8, 16), "float32")}}
        >>> rules = MatrixRules([("stem/w$", MatrixSpec((0, (1, 2))))])
        >>> rules.labels(params)
        {'stem': {'w': 'muon'}}
        >>> rules.dimension_numbers(params)["stem"]["w"]
        MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))

        Every head of an attention projection by itself:

        >>> kernel = jax.ShapeDtypeStruct((64, 4, 16), "float32")
        >>> params = {"attn": {name: {"kernel": kernel} for name in ("query", "key", "value")}}
        >>> dims = MatrixRules(attention="per_head").dimension_numbers(params)
        >>> dims["attn"]["value"]["kernel"]
        MuonDimensionNumbers(reduction_axis=0, output_axis=2)

    References:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon, splits queries, keys and values;
        GLM-5 Team 2026, arXiv 2602.15763, orthogonalises head by head.
    """

    rules: Rules = ()
    scan_axis: ScanAxis = None
    attention: str = "merged"
    head_dim: int | None = None
    blocks: tuple[Rule, ...] | None = None

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
                "It says into which matrices attention kernels fall."
            )
        if head_dim is not None and (isinstance(head_dim, bool) or not isinstance(head_dim, int)):
            raise TypeError(f"head_dim must be an integer such as 64, got {head_dim!r}.")
        if attention == "merged" and (head_dim, blocks) != (None, None):
            given = "head_dim" if blocks is None else "blocks"
            raise ValueError(
                f"{given}= says how attention kernels fall into parts or heads, and with "
                "attention='merged' they do not. Leave it out, or write attention='split' or "
                "attention='per_head'."
            )
        object.__setattr__(self, "rules", _checked_rules(rules))
        object.__setattr__(self, "scan_axis", _checked_scan_axis(scan_axis))
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "head_dim", head_dim)
        object.__setattr__(self, "blocks", block_rules(blocks))

    def decisions(self, params: Tree) -> list[tuple[str, Any, Decision]]:
        """Decides for every leaf, in the order in which `params` flattens.

        Raises:
            ValueError: If it is open which axes of a leaf form matrices, or an attention block that
                is to be cut cannot be read.
        """
        leaves, values = read_tree(params)
        hidden: tuple[str, ...] = ()
        if self.attention != "merged":
            nodes = flatten_with_paths(params, is_leaf=is_masked)[0]
            hidden = tuple(path for path, node in nodes if is_masked(node))
        options = self.scan_axis, self.attention, self.head_dim, self.blocks
        decided = decide(leaves, hidden, self.rules, *options)
        return [
            (leaf.path, value, decision)
            for leaf, value, decision in zip(leaves, values, decided, strict=True)
        ]

    def resolve(self, params: Tree) -> "ResolvedRules":
        """The decisions for a whole tree, for parts that see less of it."""
        self.check_all_matched(params)
        return ResolvedRules(tuple((path, found) for path, _, found in self.decisions(params)))

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
        """Raises if a rule matches no leaf of a full tree, or nothing of it is attention to cut.

        A masked tree is partial, and `optax.tree.map_params` calls `init` with an empty one: they
        are not asked.
        """
        nodes = flatten_with_paths(params, is_leaf=is_masked)[0]
        if not nodes or any(is_masked(node) for _, node in nodes):
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
                f"attention={self.attention!r} found no attention block among {listed(paths)}. Say "
                "what its projections are called, by blocks=[(pattern, AttentionLayout(...))], or "
                "leave attention out."
            )


@dataclass(frozen=True, init=False)
class ResolvedRules(MatrixRules):
    """The decisions for the leaves of one tree, by path: what `MatrixRules` say of all of it.

    Transformations that see a part of the tree take it in the place of the rules: a masked tree has
    no embeddings, no norms and no biases, so that less can be read from it than from the whole one.
    """

    by_path: tuple[tuple[str, Decision], ...] = ()

    def __init__(self, by_path: tuple[tuple[str, Decision], ...]):
        super().__init__()
        object.__setattr__(self, "by_path", by_path)

    def decisions(self, params: Tree) -> list[tuple[str, Any, Decision]]:
        """The decisions for the leaves that are there."""
        found = dict(self.by_path)
        leaves = flatten_with_paths(params)[0]
        strange = [path for path, _ in leaves if path not in found]
        if strange:
            raise ValueError(
                f"{strange[0]} is no parameter: the tree has leaves that the parameters do not "
                f"have. Those are {listed(found)}."
            )
        return [(path, leaf, found[path]) for path, leaf in leaves]

    def check_all_matched(self, params: Tree) -> None:
        """The rules were asked on the whole tree."""


def as_rules(rules: object) -> MatrixRules:
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


def _checked_rules(rules: object) -> Rules:
    """The rules in a form that can be hashed."""
    if isinstance(rules, dict):
        rules = rules.items()
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(
            f"rules must be a list of (pattern, spec) pairs, got {rules!r}. Write, for example, "
            'MatrixRules([("foo/w$", MatrixSpec((0, 1)))]).'
        )
    checked: list[tuple[str, SpecLike | None]] = []
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(
                f"A rule must be a pair (pattern, spec), got {rule!r}. Write, for example, "
                '("foo/w$", MatrixSpec((0, 1))), or ("foo/w$", None) for AdamW.'
            )
        pattern, spec = rule
        if spec is not None and not is_spec(spec):
            raise TypeError(
                f"The rule for {pattern!r} must give a MatrixSpec, MuonDimensionNumbers or None, "
                f"got {spec!r}. Write, for example, MatrixSpec((0, 1))."
            )
        compile_pattern(pattern)
        # Optax allows lists of axes, which cannot be hashed.
        keep = spec is None or isinstance(spec, MatrixSpec)
        checked.append((pattern, spec if keep else MatrixSpec(spec).dims))
    return tuple(checked)


def _checked_scan_axis(scan_axis: object) -> ScanAxis:
    """`scan_axis=` as pairs of a pattern and axes."""
    pairs = scan_axis if isinstance(scan_axis, tuple | list) else [scan_axis]
    if scan_axis is None:
        return None
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
                f"pairs (pattern, axes), got {scan_axis!r}: it is the parameter axis that holds "
                "stacked layers. None reads it from the stack."
            )
        compile_pattern(pattern)
        checked.append((pattern, whole))
    return tuple(checked)
