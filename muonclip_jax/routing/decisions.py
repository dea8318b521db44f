"""All decisions for one tree: by the user's rules, the tree, and attention layouts, in this order.

Some leaves can be recognised only from the whole tree. A kernel with one output per expert next to
it is the router. An output head has the input width and output size of the token embedding's
columns and rows: if exactly one kernel outside of all blocks has, it is the head. Position and type
tables are not token embeddings. If this does not decide, layers that may be the last one get a
flag.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from muonclip_jax._specs import MatrixSpec, SpecLike, normalize_spec, normalized_axes
from muonclip_jax.heads.cuts import Cut, attention_cuts
from muonclip_jax.heads.finding import Rule, strip_outer
from muonclip_jax.routing.inference import Decision, infer, token_tables
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.stacks import ScanAxis
from muonclip_jax.routing.suggestions import unknown_leaves
from muonclip_jax.routing.table import EXPERT_STACK, OUTPUT_HEAD, direction

Rules: TypeAlias = tuple[tuple[str, SpecLike | None], ...]


@functools.lru_cache(maxsize=64)
def decide(
    leaves: tuple[Leaf, ...],
    hidden: tuple[str, ...],
    rules: Rules,
    scan_axis: ScanAxis,
    attention: str,
    head_dim: int | None,
    blocks: tuple[Rule, ...] | None,
) -> tuple[Decision, ...]:
    """Decides for all visible leaves, given the paths of masked ones and fields of `MatrixRules`.

    Results are cached for equal trees.

    Raises:
        ValueError: If the matrix axes of a leaf are ambiguous, or an attention block cannot be
            split.
    """
    given = {leaf.path: _by_rule(rules, leaf) for leaf in leaves}
    ruled = frozenset(path for path, decision in given.items() if decision is not None)
    decided = infer(leaves, ruled, scan_axis)
    decided |= _find_routers(leaves, decided)
    decided |= _find_output_head(leaves, decided, ruled)
    if attention != "merged":
        cut = functools.partial(
            attention_cuts, attention=attention, head_dim=head_dim, blocks=blocks
        )
        decided |= _cut_attention(cut, leaves, decided, ruled, hidden)
    for path, decision in given.items():
        if decision is not None:
            decays = decision.spec is not None or decided[path].decays
            decided[path] = dataclasses.replace(decision, decays=decays)
    if any(decision.readings for decision in decided.values()):
        raise unknown_leaves(leaves, decided)
    return tuple(decided[leaf.path] for leaf in leaves)


def _by_rule(rules: Rules, leaf: Leaf) -> Decision | None:
    for pattern, spec in rules:
        if re.search(pattern, leaf.path):
            why = f"rule {pattern!r}"
            if spec is None:
                return Decision(None, why)
            if not leaf.trained:
                raise ValueError(
                    f"{leaf.path} of shape {leaf.shape} has an integer or bool dtype, and {why} "
                    f"assigns it to Muon. Leave it out of the tree, or write ({pattern!r}, None)."
                )
            return Decision(normalize_spec(spec, leaf.shape, leaf.path), why)
    return None


def _cut_attention(
    cut: Callable[..., dict[str, Cut]],
    leaves: tuple[Leaf, ...],
    decided: dict[str, Decision],
    ruled: frozenset[str],
    hidden: tuple[str, ...],
) -> dict[str, Decision]:
    """Decisions by attention layouts, which replace those by names but not those by rules."""
    free = {
        strip_outer(leaf.path): leaf
        for leaf in leaves
        if leaf.path not in ruled and (decided[leaf.path].spec or decided[leaf.path].readings)
    }
    found: dict[str, Decision] = {}
    for stack in sorted({decision.stack for decision in decided.values()}):
        inside = {name: x for name, x in free.items() if decided[x.path].stack == stack}
        later = stack[:1] not in ((), (0,))
        stacked = {n for n, x in inside.items() if x.name.stacked or (x.name.grouped and later)}
        cuts = cut(
            {strip_outer(leaf.path): leaf for leaf in leaves},
            {name: decided[leaf.path].spec for name, leaf in inside.items()},
            [strip_outer(path) for path in hidden],
            stack=stack,
            stacked=stacked,
        )
        if cuts and stack != tuple(range(len(stack))) and len(stack) > 1:
            raise ValueError(
                f"{next(iter(cuts))} is stacked on axes {stack}. Attention kernels in nested scans "
                "can only be split if the layers are on the first axes. Write a rule for those "
                "kernels."
            )
        found |= {free[name].path: Decision(*made) for name, made in cuts.items()}
    return found


def _find_routers(leaves: Sequence[Leaf], decided: Mapping[str, Decision]) -> dict[str, Decision]:
    """Returns the changed decisions: a kernel with one output per expert is a router."""
    experts: dict[str, set[int]] = {}
    for leaf in leaves:
        decision = decided[leaf.path]
        if decision.why.startswith(EXPERT_STACK) and decision.spec is not None:
            used = {*sum(normalized_axes(decision.spec), ()), *decision.stack}
            for module in filter(None, leaf.modules[:2]):
                counts = {n for axis, n in enumerate(leaf.shape) if axis not in used}
                experts.setdefault(module, set()).update(counts)
    found: dict[str, Decision] = {}
    for leaf in leaves:
        decision = decided[leaf.path]
        if decision.spec is not None and not decision.why.startswith("expert"):
            inputs, outputs = _sizes(leaf, decision.spec)
            near = set[int]().union(*(experts.get(module, ()) for module in leaf.modules[:2]))
            if outputs in near and inputs != outputs:
                found[leaf.path] = Decision(None, "router: a number for each expert beside it")
    return found


def _find_output_head(
    leaves: Sequence[Leaf], decided: Mapping[str, Decision], ruled: frozenset[str]
) -> dict[str, Decision]:
    """Returns the changed decisions: the output head goes to AdamW, candidates get a flag."""
    blocks = _blocks(leaves, decided)
    leaves = [leaf for leaf in leaves if leaf.path not in ruled]
    sizes: dict[str, tuple[int, int]] = {}  # of kernels outside of blocks
    for leaf in leaves:
        decision = decided[leaf.path]
        inside = _in_list(leaf) or not blocks.isdisjoint(leaf.modules[1:])
        inside = inside or bool(decision.stack) or direction(leaf.name) == "i"
        if decision.spec is not None and not inside:
            sizes[leaf.path] = _sizes(leaf, decision.spec)
    tables = token_tables(leaves)
    heads = [path for path, size in sizes.items() if size[::-1] in tables]
    by_name = any(decided[leaf.path].why == OUTPUT_HEAD for leaf in leaves)
    if len(heads) == 1 and not by_name and len(set(sizes[heads[0]])) == 2:
        return {heads[0]: Decision(None, "output head: as large as the token embedding")}
    flags = dict.fromkeys(heads, "the output layer")
    if not heads and not by_name:
        flags = _candidates(leaves, sizes, decided, bool(tables))
    return {path: dataclasses.replace(decided[path], flag=flag) for path, flag in flags.items()}


def _candidates(
    leaves: Sequence[Leaf],
    sizes: Mapping[str, tuple[int, int]],
    decided: Mapping[str, Decision],
    has_table: bool,
) -> dict[str, str]:
    """Flags kernels whose output size is no other kernel's input size, or the reverse."""
    specs = [(leaf, spec) for leaf in leaves if (spec := decided[leaf.path].spec) is not None]
    both = [_sizes(leaf, spec) for leaf, spec in specs]
    read, made = (Counter(size[side] for size in both) for side in (0, 1))
    layered = any(_in_list(leaf) or decided[leaf.path].stack for leaf in leaves)
    shapes = Counter(sizes.values())
    found: dict[str, str] = {}
    for leaf in leaves:
        inputs, outputs = sizes.get(leaf.path, (0, 0))
        twins = shapes[outputs, inputs]  # a table beside its head
        if len(leaf.shape) != 2 or inputs == outputs:
            continue
        if read[outputs] <= twins:
            found[leaf.path] = "the output layer"
        elif layered and not has_table and inputs > outputs and made[inputs] <= twins:
            found[leaf.path] = "a table of embeddings"
    return found


def _sizes(leaf: Leaf, spec: MatrixSpec) -> tuple[int, int]:
    inputs, outputs = (math.prod(leaf.shape[a] for a in axes) for axes in normalized_axes(spec))
    return inputs, outputs


def _in_list(leaf: Leaf) -> bool:
    """Whether the leaf belongs to one of a list of layers."""
    return leaf.name.grouped or any(part.isdigit() for part in leaf.path.split("/")[:-2])


def _blocks(leaves: Sequence[Leaf], decided: Mapping[str, Decision]) -> set[str]:
    """The modules that are blocks: several kernels, but no list, stack or token embedding."""
    kernels: Counter[str] = Counter()
    wider: set[str] = {""}
    for leaf in leaves:
        if decided[leaf.path].stack or leaf.name.grouped or token_tables([leaf]):
            wider.update(leaf.modules)
        elif decided[leaf.path].spec is not None:
            kernels.update(leaf.modules)
    return {module for module, count in kernels.items() if count > 1} - wider
