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
from muonclip_jax.routing import AttentionLayout, Projection
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
    inside = [path for path in leaves if path.startswith((block + "/", block + "."))]
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
            changed[name[len(block) + 1 :].replace(".", "/")] = ratio
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


def test_two_streams_of_one_attention_are_clipped_together_or_not_at_all():
    # As in pi0: tokens of two widths, each with its projections, attend to each other.
    rng, sizes = np.random.default_rng(0), {"": 12, "_1": 6}
    shapes = {"q_einsum": (4,), "kv_einsum": (2, 1)}
    leaves = {f"{x}{end}": (*shapes[x], n, 8) for end, n in sizes.items() for x in shapes}
    attn = {x: {"w": jnp.asarray(rng.normal(size=shape), "f4")} for x, shape in leaves.items()}
    tokens = {end: rng.normal(size=(5, n)) for end, n in sizes.items()}

    def maxima(attn):
        query = [
            np.einsum("td,ndh->nth", x, attn[f"q_einsum{end}"]["w"]) for end, x in tokens.items()
        ]
        key = [x @ np.asarray(attn[f"kv_einsum{end}"]["w"])[0, 0] for end, x in tokens.items()]
        logits = np.concatenate(query, axis=1) @ np.concatenate(key).T
        return jnp.asarray(logits.max((1, 2)), jnp.float32)

    before = {"attn": maxima(attn)}
    threshold = float(np.median(before["attn"]))
    with pytest.raises(ValueError, match="'attn/kv_einsum_1/w' may make queries or keys too"):
        apply_qk_clip({"attn": attn}, before, threshold=threshold)
    roles = {"q_einsum": ("query",), "kv_einsum": ("key", "value")}
    parts = [Projection(x + end, roles[x], input_axis=-2) for end in sizes for x in roles]
    layout = AttentionLayout(tuple(parts), head_dim=8)
    new, _ = apply_qk_clip({"attn": attn}, before, threshold=threshold, blocks=layout)
    expected = np.minimum(before["attn"], threshold)
    np.testing.assert_allclose(maxima(new["attn"]), expected, rtol=1e-4)
