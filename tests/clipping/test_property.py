"""The property itself: attention, clip, attention again, for every layout.

Each clipped head's largest logit is the threshold, every other head's is what it was, and every
weight that belongs to no clipped head keeps its bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from muonclip_jax.clipping import apply_qk_clip
from tests.clipping.cases import CASES, Case
from tests.helpers import TOLERANCE

BY_NAME = {case.name: case for case in CASES}


def _model(case: Case, seed: int, **changes: int):
    s = case.sizes(**changes)
    x = np.random.default_rng([seed, 1]).standard_normal((7, s.d))
    return case.params(s, seed), lambda block: case.maxima(block, x, s), s


def _threshold_between(before: np.ndarray) -> float:
    """A threshold that some heads pass and some do not, never close to a maximum."""
    positive = np.sort(np.maximum(before, 0.1 * np.abs(before).max()))
    gap = int(np.argmax(np.diff(positive)))
    return float(np.mean(positive[gap : gap + 2]))


def _clip(case: Case, block, before, threshold, **keywords):
    tree = {"decoder": {"attn": jax.tree.map(jnp.asarray, block)}}
    maxima = {"decoder/attn": jnp.asarray(before, jnp.float32)}
    new, info = apply_qk_clip(tree, maxima, blocks=case.blocks, threshold=threshold, **keywords)
    return new["decoder"]["attn"], info


def _heads_that_see(case: Case, block, s) -> list[np.ndarray]:
    """For every entry of every leaf, `(*shape, heads)`: whether the head's q or k depends on it.

    Told by poison: a NaN in one entry reaches whatever depends on it.
    """
    x = np.random.default_rng(0).standard_normal((7, s.d))
    leaves, treedef = jax.tree.flatten(block)
    seen = []
    for number, leaf in enumerate(leaves):
        seen.append(np.zeros((*np.shape(leaf), s.n), bool))
        for index in np.ndindex(*np.shape(leaf)):
            poisoned = [np.array(other) for other in leaves]
            poisoned[number][index] = np.nan
            for y in case.queries_and_keys(jax.tree.unflatten(treedef, poisoned), x, s):
                seen[-1][index] |= np.isnan(y).any((0, 2))
    return seen


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: CASES[i].name)
def test_clipped_heads_reach_the_threshold_and_nothing_else_changes(number):
    case, alpha = CASES[number], (0.5, 0.3, 1.0, 0.0)[number % 4]
    block, maxima, s = _model(case, 0, model=7)
    before, seen = maxima(block), _heads_that_see(case, block, s)
    threshold = _threshold_between(before)
    gamma = np.where(before > threshold, threshold / before, 1.0)
    eta = np.repeat(gamma.reshape(s.m, -1).min(1), s.g)
    for rule in ("query",) if case.own_keys else ("query", "balanced", "group"):
        new, info = _clip(case, block, before, threshold, alpha=alpha, shared_keys=rule)
        assert 0 < int(info.total_clipped) == (gamma < 1).sum() < s.n
        factor = eta if rule == "group" else gamma
        np.testing.assert_allclose(maxima(new), factor * before, rtol=1e-5)
        clipped = (gamma if rule == "query" else eta) < 1
        for old, now, influence in zip(*map(jax.tree.leaves, (block, new)), seen, strict=True):
            changed = influence[old.view(np.uint32) != np.asarray(now).view(np.uint32)]
            assert changed[:, clipped].any(1).all(), "a weight that makes no clipped head changed"
            assert not changed[:, ~clipped].any(), "a weight of a head that is let be changed"
    new, info = _clip(case, block, before, 2 * before.max(), alpha=alpha)
    assert int(info.total_clipped) == 0
    jax.tree.map(np.testing.assert_array_equal, new, block)


@settings(max_examples=40, deadline=None, derandomize=True)
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
    heads = (case.key_heads or kv_heads) * group
    block, maxima, _ = _model(case, seed, heads=heads, kv_heads=kv_heads, head=head, model=model)
    block = jax.tree.map(lambda w: jnp.asarray(w, dtype), block)
    before = maxima(block)
    threshold = 0.7 * float(before.max())
    new, _ = _clip(case, block, before, threshold)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    after, over = maxima(new), before > threshold
    np.testing.assert_allclose(after[over], threshold, rtol=TOLERANCE[dtype])
    np.testing.assert_array_equal(after[~over], before[~over])


STACKED = [
    *(((-1,), "linen"), ((1,), "merged, grouped"), ((-1,), "transposed"), ((0, 1), "falcon")),
    *(((0, 2), "maxtext fused"), ((1,), "maxtext latent"), ((0,), "gate, found")),
    *(pytest.param((0, 1), name, marks=pytest.mark.slow) for name in BY_NAME),
]


@pytest.mark.parametrize(("axes", "name"), STACKED, ids=str)
def test_stacked_layers_each_have_their_own_gamma(name, axes):
    case = BY_NAME[name]
    counts = (3, 2)[: len(axes)]
    layers, befores = [], []
    for seed in range(int(np.prod(counts))):
        block, maxima, _ = _model(case, seed)
        layers.append(block)
        befores.append(maxima(block))
    before = np.stack(befores)
    threshold = float(np.median(before))

    def stack(*leaves):
        joined = np.stack(leaves)
        joined = joined.reshape(*counts, *joined.shape[1:])
        return np.moveaxis(joined, tuple(range(len(axes))), axes)

    new, info = _clip(case, jax.tree.map(stack, *layers), before.reshape(*counts, -1), threshold)
    assert info.gamma["decoder/attn"].shape == (*counts, before.shape[-1])
    flat = jax.tree.map(
        lambda leaf: np.moveaxis(np.asarray(leaf), axes, tuple(range(len(axes)))), new
    )
    for number, index in enumerate(np.ndindex(*counts)):
        alone, _ = _clip(case, layers[number], before[number], threshold)
        one = jax.tree.map(lambda leaf, at=index: leaf[at], flat)
        jax.tree.map(np.testing.assert_array_equal, one, alone)
