"""All decisions for one tree: the user's rules, the tree, attention layouts, in this order."""

import dataclasses
import functools
import re
from collections.abc import Callable

from muonclip_jax._specs import SpecLike, normalize_spec
from muonclip_jax.heads.cuts import Cut, attention_cuts
from muonclip_jax.heads.finding import Rule, strip_outer
from muonclip_jax.routing.inference import Decision, infer
from muonclip_jax.routing.leaves import Leaf
from muonclip_jax.routing.scan_axis import ScanAxis
from muonclip_jax.routing.suggestions import unknown_leaves
from muonclip_jax.routing.whole_tree import find_output_head, find_routers

Rules = tuple[tuple[str, SpecLike | None], ...]


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
    """Decides for all leaves; equal trees are read once.

    Args:
        leaves: The leaves that are visible.
        hidden: Paths of masked leaves.
        rules: Pairs of a pattern and a spec; as all that follow, a field of `MatrixRules`.
        scan_axis: Where stacked layers sit.
        attention: Into what attention kernels fall.
        head_dim: Features of a query head.
        blocks: Which attention blocks fall into parts.

    Raises:
        ValueError: If it is open which axes of a leaf form matrices, or an attention block that is
            to be cut cannot be read.
    """
    given = {leaf.path: _by_rule(rules, leaf) for leaf in leaves}
    ruled = frozenset(path for path, decision in given.items() if decision is not None)
    decided = infer(leaves, ruled, scan_axis)
    decided |= find_routers(leaves, decided, ruled)
    decided |= find_output_head(leaves, decided, ruled)
    if attention != "merged":
        cut = functools.partial(
            attention_cuts, attention=attention, head_dim=head_dim, blocks=blocks
        )
        decided |= _cut_attention(cut, leaves, decided, ruled, hidden)
    for path, decision in given.items():
        if decision is not None:
            decays = decision.spec is not None or decided[path].decays
            decided[path] = dataclasses.replace(decision, decays=decays)
    if any(decision.unknown for decision in decided.values()):
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
                    f"{leaf.path} of shape {leaf.shape} holds integers or bools, and {why} gives "
                    f"it to Muon. Leave it out of the tree, or write ({pattern!r}, None)."
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
    """What attention layouts say in the place of what names say, not of rules."""
    open_ = {
        strip_outer(leaf.path): leaf.path
        for leaf in leaves
        if leaf.path not in ruled
        and (decided[leaf.path].spec is not None or decided[leaf.path].unknown)
    }
    found: dict[str, Decision] = {}
    for stack in sorted({decision.stack for decision in decided.values()}):
        specs = {n: decided[p].spec for n, p in open_.items() if decided[p].stack == stack}
        cuts = cut(
            {strip_outer(leaf.path): leaf for leaf in leaves},
            specs,
            [strip_outer(path) for path in hidden],
            stack=stack,
        )
        if cuts and stack != tuple(range(len(stack))) and len(stack) > 1:
            raise ValueError(
                f"{next(iter(cuts))} is stacked on axes {stack}. Attention kernels in nested scans "
                "are cut where the layers are on the first axes. Give those kernels a rule."
            )
        found |= {open_[name]: Decision(*cut_) for name, cut_ in cuts.items()}
    return found
