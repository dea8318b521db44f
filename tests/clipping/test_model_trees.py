"""Attention blocks of real models: found, clipped or refused as the model's source says.

`tests/routing/trees/<family>.json` holds every leaf of a model and, written from its source, each
attention block: heads, stacked axes, the projections that a clip scales, or why none can be.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.clipping import apply_qk_clip, describe_attention
from tests.routing.test_trees import FAMILIES, TREES, nest

#: Families whose tree holds blocks that differ only in the number of their layer.
ENTRIES = {}
for family in FAMILIES:
    tree = json.loads((TREES / f"{family}.json").read_text())
    for entry in tree["attention"]:
        ENTRIES.setdefault((family, re.sub(r"\d+", "N", entry["block"])), (tree["leaves"], entry))


@pytest.mark.parametrize("case", ENTRIES, ids=lambda case: f"{case[0]} {case[1].split('/')[-1]}")
def test_a_block_is_read_and_clipped_as_its_source_says(case):
    leaves, entry = ENTRIES[case]
    block, heads = entry["block"], entry["heads"]
    inside = {path: leaf for path, leaf in leaves.items() if path.startswith(block + "/")}
    first = next(path for path in inside if len(leaves[path]["shape"]) > len(entry["stack_axes"]))
    stack = tuple(leaves[first]["shape"][axis] for axis in entry["stack_axes"])
    only = re.escape(block) + "$"
    form = jax.ShapeDtypeStruct((*stack, heads), jnp.float32)
    described = nest(leaves)
    if entry["clippable"] is False:
        with pytest.raises(ValueError, match=r"cannot clip|matches no path"):
            apply_qk_clip(described, {block: form}, blocks=only)
        return
    text = describe_attention(described, {block: form}, blocks=only)
    title = next(line for line in text.split("\n") if line.startswith(f"{block}: "))
    count = f"{heads} heads of"
    if entry["kv_heads"] != heads:
        keys = "1 key head" if entry["kv_heads"] == 1 else f"{entry['kv_heads']} key heads"
        count = f"{heads} query heads on {keys} of"
    assert count in title
    assert (f"stacked {stack}" in title) == bool(stack)
    if entry["clippable"] == "unknown":  # normalised, and no leaf shows it
        return

    # One head of one layer is over the threshold.
    rng = np.random.default_rng(0)
    params = nest(leaves)
    params = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), "f4"), params)
    layer = (*(size - 1 for size in stack), heads - 1)
    maxima = {block: jnp.ones(form.shape).at[layer].set(400.0)}
    new, info = apply_qk_clip(params, maxima, blocks=only)
    assert int(info.total_clipped) == 1
    changed = {}
    ratios = jax.tree.map(lambda after, before: np.asarray(after / before) != 1, new, params)
    for path, ratio in jax.tree_util.tree_flatten_with_path(ratios)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if ratio.any():
            changed[name.removeprefix(block + "/")] = ratio
    # Keys that query heads share stay as they are.
    scaled = [*entry["query"], *(entry["key"] if entry["kv_heads"] == heads else ())]
    assert all(any(f"{name}/".startswith(f"{s}/") for s in scaled) for name in changed)
    assert all(any(f"{name}/".startswith(f"{s}/") for name in changed) for s in scaled)
    for name, where in changed.items():
        share = where.size // (heads * int(np.prod(stack)))
        if name.split("/")[0] in entry["query"] and entry["kind"] == "separate":
            assert where.sum() == share, name
        for axis, at in zip(entry["stack_axes"], layer, strict=False):
            assert set(np.nonzero(where)[axis]) == {at}, name
