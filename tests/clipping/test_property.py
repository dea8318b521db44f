"""The property itself: attention, clip, attention again, for every layout.

Each clipped head's largest logit is the threshold, every other head's is what it was, and every
weight that belongs to no clipped head keeps its bits.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from muonclip_jax.clipping import apply_qk_clip
from tests.clipping.cases import CASES
from tests.clipping.oracle import Case, maxima_of, normal, wide
from tests.helpers import TOLERANCE

BY_NAME = {case.name: case for case in CASES}


def _model(case: Case, seed: int, **changes: int):
    sizes = case.sizes(**changes)
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    params = case.params(rng, sizes)
    x = wide(normal(rng, 7, sizes.model))

    def maxima(attn):
        return maxima_of(*case.heads_of(attn, x, sizes))

    return params, maxima, sizes


def _threshold_between(before: np.ndarray) -> float:
    """A threshold that some heads pass and some do not, never close to a maximum."""
    positive = np.sort(np.maximum(before, 0.1 * np.abs(before).max()))
    gap = int(np.argmax(np.diff(positive)))
    return float(np.mean(positive[gap : gap + 2]))


def _clip(case: Case, attn, before, **settings_):
    tree = {"decoder": {"attn": jax.tree.map(jnp.asarray, attn)}}
    maxima = {"decoder/attn": jnp.asarray(before, jnp.float32)}
    new, info = apply_qk_clip(tree, maxima, blocks=case.blocks, **settings_)
    return new["decoder"]["attn"], info


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    "alpha", [0.5, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.3, 1.0, 0.0))]
)
def test_clipped_heads_reach_the_threshold_and_others_stay(name, alpha):
    attn, maxima, _ = _model(BY_NAME[name], 0)
    before = maxima(attn)
    threshold = _threshold_between(before)
    new, info = _clip(BY_NAME[name], attn, before, threshold=threshold, alpha=alpha)
    expected = np.where(before > threshold, threshold, before)
    assert 0 < int(info.total_clipped) < len(before)
    np.testing.assert_allclose(maxima(new), expected, rtol=1e-5)


@pytest.mark.parametrize("name", BY_NAME)
def test_without_a_head_over_the_threshold_every_bit_stays(name):
    attn, maxima, _ = _model(BY_NAME[name], 1)
    before = maxima(attn)
    new, info = _clip(BY_NAME[name], attn, before, threshold=2 * before.max())
    assert int(info.total_clipped) == 0
    jax.tree.map(np.testing.assert_array_equal, new, attn)


@pytest.mark.parametrize("name", BY_NAME)
def test_bfloat16_weights_stay_bfloat16_and_reach_the_threshold_to_rounding(name):
    attn, maxima, _ = _model(BY_NAME[name], 2)
    attn = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), attn)
    before = maxima(attn)
    threshold = _threshold_between(before)
    new, _ = _clip(BY_NAME[name], attn, before, threshold=threshold)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    after = maxima(new)
    np.testing.assert_allclose(after[before > threshold], threshold, rtol=TOLERANCE["bfloat16"])
    np.testing.assert_array_equal(after[before <= threshold], before[before <= threshold])


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.own_keys])
def test_balanced_is_exact_where_heads_share_keys(name):
    attn, maxima, _ = _model(BY_NAME[name], 3)
    before = maxima(attn)
    threshold = _threshold_between(before)
    new, _ = _clip(BY_NAME[name], attn, before, threshold=threshold, shared_keys="balanced")
    expected = np.where(before > threshold, threshold, before)
    np.testing.assert_allclose(maxima(new), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.own_keys])
def test_group_brings_every_head_of_a_group_down_by_the_largest(name):
    attn, maxima, sizes = _model(BY_NAME[name], 4)
    before = maxima(attn)
    threshold = _threshold_between(before)
    new, _ = _clip(BY_NAME[name], attn, before, threshold=threshold, shared_keys="group")
    gamma = np.where(before > threshold, threshold / before, 1.0)
    eta = np.repeat(gamma.reshape(sizes.kv_heads, -1).min(1), sizes.heads // sizes.kv_heads)
    np.testing.assert_allclose(maxima(new), eta * before, rtol=1e-5)


def _heads_that_see(case: Case, attn, sizes) -> dict[str, np.ndarray]:
    """For every entry of every leaf, `(*shape, heads)`: whether the head's q or k depends on it.

    Told by poison: a NaN in one entry reaches whatever depends on it.
    """
    x = wide(normal(np.random.default_rng(0), 7, sizes.model))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(attn)
    seen = {}
    for number, (path, leaf) in enumerate(leaves):
        influence = np.zeros((*np.shape(leaf), sizes.heads), bool)
        for index in np.ndindex(*np.shape(leaf)):
            poisoned = [np.array(other) for _, other in leaves]
            poisoned[number][index] = np.nan
            for y in case.heads_of(jax.tree.unflatten(treedef, poisoned), x, sizes):
                influence[index] |= np.isnan(y).any((0, 2))
        seen[jax.tree_util.keystr(path)] = influence
    return seen


@pytest.mark.parametrize("shared_keys", ["query", pytest.param("balanced", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BY_NAME)
def test_only_weights_that_make_a_clipped_head_change(name, shared_keys):
    case = BY_NAME[name]
    attn, maxima, sizes = _model(case, 5, model=7, head=6, latent=5)
    before = maxima(attn)
    threshold = _threshold_between(before)
    new, _ = _clip(case, attn, before, threshold=threshold, shared_keys=shared_keys)
    clipped = before > threshold
    if shared_keys == "balanced":  # a group with a clipped head shares its key's factor
        clipped = np.repeat(
            clipped.reshape(sizes.kv_heads, -1).any(1), sizes.heads // sizes.kv_heads
        )
    seen = _heads_that_see(case, attn, sizes)
    changed = jax.tree.map(
        lambda a, b: np.asarray(a).view(np.uint32) != np.asarray(b).view(np.uint32), new, attn
    )
    for path, entries in jax.tree_util.tree_flatten_with_path(changed)[0]:
        influence = seen[jax.tree_util.keystr(path)][entries]
        assert influence[:, clipped].any(1).all(), "a weight that makes no clipped head changed"
        assert not influence[:, ~clipped].any(), "a weight of a head under the threshold changed"
    assert any(entries.any() for entries in jax.tree.leaves(changed))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(BY_NAME)),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    head=st.integers(3, 5).map(lambda n: 2 * n),
    model=st.integers(11, 17),
    seed=st.integers(0, 100),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_shapes(name, kv_heads, group, head, model, seed, dtype):
    """Widths over ten with at most twelve heads and layers, so that no axis looks like another."""
    case = BY_NAME[name]
    heads = kv_heads * group
    attn, maxima, _ = _model(case, seed, heads=heads, kv_heads=kv_heads, head=head, model=model)
    attn = jax.tree.map(lambda w: jnp.asarray(w, dtype), attn)
    before = maxima(attn)
    threshold = 0.7 * float(before.max())
    new, _ = _clip(case, attn, before, threshold=threshold)
    after = maxima(new)
    tolerance = 1e-5 if dtype == "float32" else TOLERANCE["bfloat16"]
    np.testing.assert_allclose(after[before > threshold], threshold, rtol=tolerance)
    np.testing.assert_array_equal(after[before <= threshold], before[before <= threshold])


OFTEN_STACKED = (
    "linen",
    "merged, grouped",
    "transposed",
    "falcon",
    "maxtext fused",
    "maxtext latent",
)
STACKINGS = [
    pytest.param(axes, name, marks=() if axes in ((0,), (1,)) else pytest.mark.slow)
    for axes in ((0,), (1,), (-1,), (0, 1), (0, 2))
    for name in (BY_NAME if axes == (0, 1) else OFTEN_STACKED)
]


@pytest.mark.parametrize(("axes", "name"), STACKINGS, ids=str)
def test_stacked_layers_each_have_their_own_gamma(name, axes):
    case = BY_NAME[name]
    counts = (3, 2)[: len(axes)]
    layers, befores = [], []
    for seed in range(int(np.prod(counts))):
        attn, maxima, _ = _model(case, seed)
        layers.append(attn)
        befores.append(maxima(attn))
    before = np.stack(befores)
    threshold = float(np.median(before))

    def stack(*leaves):
        joined = np.stack(leaves)
        joined = joined.reshape(*counts, *joined.shape[1:])
        return np.moveaxis(joined, tuple(range(len(axes))), axes)

    if any(np.ndim(leaf) < max(axes) for leaf in jax.tree.leaves(layers[0])):
        pytest.skip("a leaf without that axis cannot be stacked on it")
    stacked = jax.tree.map(stack, *layers)
    new, info = _clip(case, stacked, before.reshape(*counts, -1), threshold=threshold)
    assert info.gamma["decoder/attn"].shape == (*counts, before.shape[-1])
    flat = jax.tree.map(
        lambda leaf: np.moveaxis(np.asarray(leaf), axes, tuple(range(len(axes)))), new
    )
    for number, index in enumerate(np.ndindex(*counts)):
        alone, _ = _clip(case, layers[number], before[number], threshold=threshold)
        one = jax.tree.map(lambda leaf, at=index: leaf[at], flat)
        jax.tree.map(np.testing.assert_array_equal, one, alone)
