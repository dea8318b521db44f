"""Decisions by the whole tree: routers, output heads, attention; and the error for unknown leaves.

An output head has the shape of the token embedding, transposed: if exactly one kernel outside of
all blocks has, it is the head, and beside a head that its name tells, such a leaf is the table. If
this does not decide, the candidates get a flag.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from muonclip_jax._specs import MatrixSpec, normalized_axes, write_rule, write_spec
from muonclip_jax._tree import generalised, pattern_for
from muonclip_jax.heads.cuts import block_cuts
from muonclip_jax.heads.finding import Rule, Shape, find_blocks, kernel_name, strip_outer
from muonclip_jax.heads.plan import MisfitError
from muonclip_jax.routing.inference import token_tables
from muonclip_jax.routing.leaves import Decision, Leaf, lengths, to_spec
from muonclip_jax.routing.table import EXPERT_STACK, OUTPUT_HEAD, direction, fits, look_up

_LEAVES_SHOWN = 8
_TABLE = "a table of embeddings"


def find_routers(leaves: Sequence[Leaf]) -> None:
    """Gives kernels with one output per expert beside them to AdamW."""
    experts: defaultdict[str, set[int]] = defaultdict(set)
    for leaf in leaves:
        spec = leaf.decision.spec
        if spec is not None and leaf.decision.why == EXPERT_STACK:
            used = {*sum(normalized_axes(spec), ()), *(leaf.stack or ())}
            for module in filter(None, leaf.modules[:3]):
                experts[module] |= {n for axis, n in enumerate(leaf.shape) if axis not in used}
    for leaf in leaves:
        if leaf.decision.spec is not None and leaf.decision.why != EXPERT_STACK:
            inputs, outputs = _sizes(leaf)
            near = {n for module in leaf.modules[:2] for n in experts[module]}
            turned = inputs in near and fits("gate|gating|wg", leaf.name.role)
            if inputs != outputs and (outputs in near or turned):
                leaf.decision = Decision(None, "router: a number for each expert beside it")


def find_output_head(leaves: Sequence[Leaf]) -> None:
    """Gives the output head to AdamW, or flags the candidates."""
    free = [leaf for leaf in leaves if leaf.ruled is None]
    matrices = [leaf for leaf in free if leaf.decision.spec is not None]
    listed = {
        x for x in leaves if x.stack or x.name.grouped or re.search(r"(?:^|/)\d+/.*/", x.path)
    }
    blocks, layers, ends = _blocks(leaves)
    outside = [
        leaf
        for leaf in matrices
        if leaf not in listed
        and blocks.isdisjoint({*leaf.modules[1:]} - ends[leaf])
        and direction(leaf.name) != "i"
    ]
    tables = token_tables(free)
    heads = [leaf for leaf in outside if _sizes(leaf)[::-1] in tables]
    named = [leaf for leaf in free if leaf.decision.why == OUTPUT_HEAD]
    turned = [x.shape if x.output_first else x.shape[::-1] for x in named]
    unsure = [x for x in outside if not (x.biased or look_up(x.name, x.layer).sure)]
    beside = [x for x in unsure if x.shape in turned and x.shape not in tables]
    flags = dict.fromkeys(heads, "the output layer")
    if len(heads) == 1 and not named and len({*_sizes(heads[0])}) == 2:
        heads[0].decision = Decision(None, "output head: as large as the token embedding")
        flags = {}
    elif len(beside) == 1 and len({*beside[0].shape}) == 2 and beside[0].name.leaf != "kernel":
        beside[0].decision = Decision(None, "embedding table: as large as the output head")
    layered = bool(layers) or any(leaf in listed for leaf in free)
    if not heads and not named:
        # Kernels whose output size is no other kernel's input size, or the reverse. Of a
        # layer only the sizes that all its kernels have are seen outside, if there are any.
        layer = {x: next((m for m in x.modules[::-1] if m in layers), "") for x in matrices}
        shared: dict[str, set[int]] = {"": set()}
        for leaf, module in layer.items():
            shared[module] = shared.get(module, {*_sizes(leaf)}) & {*_sizes(leaf)}
        read, made = (
            Counter(n for x in matrices if (n := _sizes(x)[side]) in (shared[layer[x]] or {n}))
            for side in (0, 1)
        )
        shapes = Counter(map(_sizes, outside))
        for leaf in outside:
            inputs, outputs = _sizes(leaf)
            twins = 0 if ends[leaf] else shapes[outputs, inputs]  # a table beside its head
            if shapes[inputs, outputs] > 1 < twins:
                continue  # layers without modules of their own
            if len(leaf.shape) == 2 and inputs != outputs and read[outputs] <= twins:
                either = not (made[inputs] or leaf.biased)  # nothing makes what it would read
                flags[leaf] = "the output layer" + f" or {_TABLE}" * either
            elif len(leaf.shape) == 2 and inputs > outputs and made[inputs] <= twins:
                flags |= {leaf: _TABLE} if layered and not tables else {}
        pair = [leaf for leaf, flag in flags.items() if flag == _TABLE]
        pair += [x for x in flags if any(_sizes(x) == _sizes(table)[::-1] for table in pair)]
        for leaf in pair if len(pair) == 2 else ():
            leaf.decision = Decision(None, "the embedding or the output head, by their sizes")
            del flags[leaf]
    widths = {shape[-1] for shape in (*tables, *turned)} if layered else set[int]()
    for leaf in unsure:
        root = "/" not in strip_outer(leaf.path) and leaf.shape[-1] in widths
        if leaf.decision.spec is not None and (leaf in beside or root):
            flags.setdefault(leaf, _TABLE)
    for leaf, flag in flags.items():
        leaf.decision = dataclasses.replace(leaf.decision, flag=flag)


def _blocks(leaves: Sequence[Leaf]) -> tuple[set[str], set[str], defaultdict[Leaf, set[str]]]:
    """Modules with several kernels, numbered layers among them, and last kernels of MLPs."""
    kernels: defaultdict[str, list[Leaf]] = defaultdict(list)
    wider = {"", "params"}  # lists, stacks, token embeddings, and the root of Flax's variables
    for leaf in leaves:
        if leaf.stack or leaf.name.grouped or token_tables([leaf]):
            wider.update(leaf.modules)
        elif leaf.decision.spec is not None:
            for module in leaf.modules:
                kernels[module].append(leaf)
    blocks = {module for module, inside in kernels.items() if len(inside) > 1} - wider
    # Blocks that differ in their number alone are layers; what contains them is no block.
    alike = Counter(re.sub(r"\d+", "", module) for module in blocks)
    layers = {module for module in blocks if alike[re.sub(r"\d+", "", module)] > 1}
    for leaf in leaves:
        outer = [i for i, module in enumerate(leaf.modules) if module in layers]
        blocks.difference_update(leaf.modules[outer[-1] + 1 :] if outer else ())
    ends: defaultdict[Leaf, set[str]] = defaultdict(set)
    for module in blocks - layers:
        if len({re.sub(r"\d+", "", leaf.path) for leaf in kernels[module]}) == 1:
            last = max(kernels[module], key=lambda x: [*map(int, re.findall(r"\d+", x.path))])
            ends[last].add(module)
    return blocks, layers, ends


def _sizes(leaf: Leaf) -> tuple[int, int]:
    spec = leaf.decision.spec or MatrixSpec()
    inputs, outputs = (math.prod(leaf.shape[a] for a in axes) for axes in normalized_axes(spec))
    return inputs, outputs


def cut_attention(
    leaves: Sequence[Leaf],
    hidden: Iterable[str],
    attention: str,
    head_dim: int | None,
    blocks: tuple[Rule, ...] | None,
) -> None:
    """Decides by attention layouts, which replace names but not rules."""
    by_path = {strip_outer(leaf.path): leaf for leaf in leaves}
    masked = dict.fromkeys(map(strip_outer, hidden), np.zeros((1, 1)))
    for block in find_blocks(masked | by_path, blocks, strict=False):
        kernels = (kernel_name(block.leaves, path) for path in block.layout.paths)
        needed = [name for name in kernels if name is not None]
        seen = {name: by_path[path] for name, path in block.paths.items() if path not in masked}
        free = {
            name: leaf
            for name, leaf in seen.items()
            if leaf.ruled is None and (leaf.decision.spec or leaf.decision.readings)
        }
        first = next((free[name] for name in needed if name in free), None)
        if not block.selected or first is None:
            continue
        # The axes of stacked layers, or where they are open those in front, as names have it.
        counts = sorted(range(len(first.shape)), key=bool, reverse=first.name.stacked)
        stacks = (first.stack or (), *(tuple(range(n)) for n in counts))
        what = f"attention block {block.path!r} ({block.layout.name})"
        if missing := [block.paths[name] for name in needed if name not in seen]:
            raise ValueError(
                f"attention={attention!r} reads {what} whole; {missing[0]!r} is masked here. Pass "
                "weight_dimension_numbers=infer_dimension_numbers(params, rules) of the whole tree."
            )
        try:
            found = block_cuts(
                block.layout,
                tuple((name, leaf.shape) for name, leaf in seen.items()),
                tuple((name, leaf.decision.spec) for name, leaf in free.items()),
                attention,
                stacks[:1] if first.decision.spec else stacks[1:],
                head_dim,
            )
        except MisfitError as misfit:
            spec = write_spec(first.decision.spec)
            such = f', such as ("{first.path}$", {spec}),' if first.decision.spec else ""
            raise ValueError(
                f"attention={attention!r} cannot split the kernels of {what}: {misfit}. Rules for "
                f"its kernels{such} take precedence over layouts."
            ) from None
        for name, cut in found:
            free[name].decision = Decision(*cut)


def unknown_leaves(leaves: Sequence[tuple[str, Shape, Decision]]) -> ValueError:
    """The error for those of the leaves that remain unknown."""
    groups: dict[tuple[str, Shape, Decision], list[str]] = {}
    for path, shape, decision in leaves:
        if decision.readings:
            groups.setdefault((generalised(path), shape, decision), []).append(path)
    count = sum(map(len, groups.values()))
    lines: list[str] = []
    for (_, shape, decision), paths in list(groups.items())[:_LEAVES_SHOWN]:
        pattern = pattern_for(paths, [path for path, _, _ in leaves])
        lines.append(f"  {paths[0]} of shape {shape} ({decision.why}), one of")
        for letters in decision.readings:
            batch, inputs, outputs = (
                " x ".join(map(str, lengths(letters, shape, x))) for x in "bio"
            )
            meaning = f"{batch + ' matrices ' if batch else ''}{inputs} -> {outputs}"
            lines.append(f"    rules={write_rule(pattern, to_spec(letters))}  # {meaning}")
        lines.append(f"    rules={write_rule(pattern, None)}  # AdamW trains it")
    lines += [f"  and {len(groups) - _LEAVES_SHOWN} more"] if len(groups) > _LEAVES_SHOWN else []
    lines.append("The pair is (reduction axes, output axes), all others are batch axes.")
    if any("stacked layers" in decision.why for _, _, decision in groups):
        lines[-1] += " If layers are stacked on one axis, write MatrixRules(scan_axis=0) or "
        lines[-1] += "MatrixRules(scan_axis=[(pattern, axis)])."
    return ValueError(
        f"{count} {'leaf' if count == 1 else 'leaves'} of rank three or more cannot be identified "
        "by name or structure, so their matrix axes are unknown. Write rules:\n" + "\n".join(lines)
    )
