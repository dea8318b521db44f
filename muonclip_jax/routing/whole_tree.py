"""What only the whole tree shows: the router beside experts, the output head, what may be one.

An output head makes as many numbers as the token embedding has rows, of as many as it has columns.
If exactly one kernel outside of all blocks does, it is the head. Position and type tables are no
token embeddings. Where that does not decide, the layers that may be the last one get a flag.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from muonclip_jax._specs import normalized_axes
from muonclip_jax.routing.inference import Decision, token_tables
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.stacks import direction

OUTPUT_HEAD = "output head: as large as the token embedding"
CANDIDATE = "the output layer"
TABLE = "a table of embeddings"


def find_output_head(
    leaves: Sequence[Leaf], decisions: Mapping[str, Decision], ruled: frozenset[str]
) -> dict[str, Decision]:
    """Returns the decisions that change: the head goes to AdamW, candidates get a flag."""
    free = [leaf for leaf in leaves if leaf.path not in ruled]
    blocks = _blocks(leaves, decisions)
    outside = [
        leaf
        for leaf in free
        if decisions[leaf.path].spec is not None
        and not decisions[leaf.path].stack
        and not _in_list(leaf)
        and blocks.isdisjoint(leaf.modules[1:])
        and direction(leaf.name) != "i"
    ]
    tables = set(token_tables(free))
    sizes = {leaf.path: _sizes(leaf, decisions[leaf.path]) for leaf in outside}
    heads = [leaf for leaf in outside if sizes[leaf.path][::-1] in tables]
    heads_by_name = any(decisions[leaf.path].why == "output head" for leaf in free)
    if len(heads) == 1 and not heads_by_name and len(set(sizes[heads[0].path])) == 2:
        return {heads[0].path: Decision(None, OUTPUT_HEAD)}
    if heads:
        return {x.path: dataclasses.replace(decisions[x.path], flag=CANDIDATE) for x in heads}
    if heads_by_name:
        return {}
    return _candidates(free, outside, sizes, decisions, bool(tables))


def find_routers(
    leaves: Sequence[Leaf], decisions: Mapping[str, Decision], ruled: frozenset[str]
) -> dict[str, Decision]:
    """Returns the decisions that change: what makes a number for each expert is their router."""
    experts: dict[str, set[int]] = {}
    for leaf in leaves:
        decision = decisions[leaf.path]
        if decision.why.startswith("expert stack") and decision.spec is not None:
            used = {axis for side in normalized_axes(decision.spec) for axis in side}
            counts = {
                n for a, n in enumerate(leaf.shape) if a not in used and a not in decision.stack
            }
            for module in leaf.modules[:2]:
                experts.setdefault(module, set()).update(counts if module else ())
    found = {}
    for leaf in leaves:
        decision = decisions[leaf.path]
        if decision.spec is None or leaf.path in ruled or decision.why.startswith("expert"):
            continue
        inputs, outputs = _sizes(leaf, decision)
        near = set().union(*(experts.get(module, ()) for module in leaf.modules[:2]))
        if outputs in near and inputs != outputs:
            found[leaf.path] = Decision(None, "router: a number for each expert beside it")
    return found


def _candidates(
    leaves: Sequence[Leaf],
    outside: Sequence[Leaf],
    sizes: Mapping[str, tuple[int, int]],
    decisions: Mapping[str, Decision],
    has_table: bool,
) -> dict[str, Decision]:
    """Kernels outside of blocks whose outputs nothing reads, or whose inputs nothing makes."""
    read: Counter[int] = Counter()
    made: Counter[int] = Counter()
    for leaf in leaves:
        decision = decisions[leaf.path]
        if decision.spec is not None:
            inputs, outputs = _sizes(leaf, decision)
            read[inputs] += 1
            made[outputs] += 1
    layered = any(_in_list(leaf) or decisions[leaf.path].stack for leaf in leaves)
    shapes = Counter(sizes[leaf.path] for leaf in outside)
    found = {}
    for leaf in outside:
        inputs, outputs = sizes[leaf.path]
        twins = shapes[outputs, inputs]  # a table beside its head
        if len(leaf.shape) != 2 or inputs == outputs:
            continue
        if read[outputs] <= twins:
            found[leaf.path] = dataclasses.replace(decisions[leaf.path], flag=CANDIDATE)
        elif layered and not has_table and inputs > outputs and made[inputs] <= twins:
            found[leaf.path] = dataclasses.replace(decisions[leaf.path], flag=TABLE)
    return found


def _sizes(leaf: Leaf, decision: Decision) -> tuple[int, int]:
    assert decision.spec is not None
    reduction, output = normalized_axes(decision.spec)
    return (
        math.prod(leaf.shape[axis] for axis in reduction),
        math.prod(leaf.shape[axis] for axis in output),
    )


def _in_list(leaf: Leaf) -> bool:
    """Whether the leaf belongs to one of a list of layers."""
    return leaf.name.grouped or any(part.isdigit() for part in leaf.path.split("/")[:-2])


def _blocks(leaves: Sequence[Leaf], decisions: Mapping[str, Decision]) -> set[str]:
    """The modules that are blocks: several kernels, and no list, stack or token embedding."""
    kernels: Counter[str] = Counter()
    wider: set[str] = {""}
    for leaf in leaves:
        decision = decisions[leaf.path]
        if decision.stack or leaf.name.grouped or token_tables([leaf]):
            wider.update(leaf.modules)
        elif decision.spec is not None:
            kernels.update(leaf.modules)
    return {module for module, count in kernels.items() if count > 1} - wider
