"""The tree of maxima, however it was recorded."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muonclip_jax.clipping.matching import merge_recordings, read_maxima

A, B = jnp.asarray([1.0, 5.0]), jnp.asarray([4.0, 2.0])
BLOCK = {"block/attn": A}
#: A tree as it was recorded, and what is read from it.
TREES = {
    "intermediates": ({"intermediates": {"block": {"attn": {"max_logits": (A,)}}}}, BLOCK),
    "beside other things": ({"block": {"attn": {"max_logits": (A,), "w": (B,)}, "o": (B,)}}, BLOCK),
    "flat": ({"block/attn": np.asarray(A)}, BLOCK),
    "boxed": ({"block": {"attn": {"max_logits": nn.Partitioned(A, (None,))}}}, BLOCK),
    "nnx": (nnx.State({"block": {"attn": {"max_logits": nnx.Intermediate((A,))}}}), BLOCK),
    "mirrored": ({"block": {"attn": A}}, BLOCK),
    "mirrored, nnx": (nnx.State({"block": {"attn": nnx.Intermediate(A)}}), BLOCK),
    "a model that is the attention": ({"max_logits": (A,)}, {"": A}),
    "layers in a list": (
        {"layers": [{"attn": {"max_logits": (A,)}}, {"attn": {"max_logits": (B,)}}]},
        {"layers/0/attn": A, "layers/1/attn": B},
    ),
}


@pytest.mark.parametrize("kind", TREES)
def test_kinds_of_trees(kind):
    tree, expected = TREES[kind]
    maxima = read_maxima(tree)[0]
    assert list(maxima) == list(expected)
    for path, recordings in maxima.items():
        np.testing.assert_array_equal(recordings[0], expected[path])


NAN, INF = jnp.nan, jnp.inf
#: Recordings, the shape of the block's maxima, and what they become.
MERGED = {
    "a tuple of any length": ([A, B, A], (2,), [4, 5]),
    "axes before the heads": ([jnp.stack([A, B, -A]).reshape(3, 1, 2)], (2,), [4, 5]),
    "before layers": ([jnp.stack([jnp.stack([A, B]), jnp.stack([B, A])])], (2, 2), [[4, 5]] * 2),
    "other leading axes": ([jnp.stack([A, B]), -A], (2,), [4, 5]),
    "not finite": ([jnp.array([[NAN, 3], [7, INF]]), jnp.array([5, NAN])], (2,), [7, 3]),
    "not finite alone": ([jnp.array([[INF, -INF], [NAN, -2.0]])], (2,), [NAN, -2]),
}


@pytest.mark.parametrize("name", MERGED)
def test_recordings_are_maxed_not_summed(name):
    recordings, shape, expected = MERGED[name]
    np.testing.assert_array_equal(merge_recordings(recordings, shape), expected)
    tree = {"attn": {"max_logits": tuple(recordings)}}
    assert len(read_maxima(tree)[0]["attn"]) == len(recordings)


@pytest.mark.parametrize("tree", [{}, None, A])
def test_what_is_no_tree_of_maxima_is_an_error(tree):
    with pytest.raises(ValueError, match=r"contains no maxima\. Expected leaves named 'max_l"):
        read_maxima(tree)
    with pytest.raises(ValueError, match=r"maxima of 'attn' are \[1.0, 2.0\]; expected arrays"):
        read_maxima({"attn": {"max_logits": [1.0, 2.0]}})
