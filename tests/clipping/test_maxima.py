"""The tree of maxima, however it was recorded."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muonclip_jax.clipping.matching import merge_recordings, read_maxima, trailing_shape

A, B = jnp.asarray([1.0, 5.0]), jnp.asarray([4.0, 2.0])

SAME = {
    "intermediates": {"intermediates": {"block": {"attn": {"max_logits": (A,)}}}},
    "without the outer level": {"block": {"attn": {"max_logits": (A,)}}},
    "beside other things": {"block": {"attn": {"max_logits": (A,), "weights": (B,)}, "out": (B,)}},
    "not in a tuple": {"block": {"attn": {"max_logits": A}}},
    "flat": {"block/attn": A},
    "flat with the name": {"block/attn/max_logits": A},
    "flat with outer levels": {"params/block/attn": A},
    "boxed": {"block": {"attn": {"max_logits": nn.Partitioned(A, (None,))}}},
    "nnx": nnx.State({"block": {"attn": {"max_logits": nnx.Intermediate((A,))}}}),
    "nnx pure": {"block": {"attn": {"max_logits": (A,)}}},
    "numpy": {"block/attn": np.asarray(A)},
    "mirrored": {"block": {"attn": A}},
    "mirrored, with outer levels": {"params": {"block": {"attn": A}}},
    "mirrored, boxed": {"block": {"attn": nn.Partitioned(A, (None,))}},
    "mirrored, nnx": nnx.State({"block": {"attn": nnx.Intermediate(A)}}),
    "half flat": {"block": {"attn": A}, "other/attn": B},
}


def recorded(tree):
    return read_maxima(tree)[0]


@pytest.mark.parametrize("kind", SAME)
def test_kinds_of_trees(kind):
    maxima, _ = read_maxima(SAME[kind])
    assert list(maxima) == ["block/attn"] + ["other/attn"] * (kind == "half flat")
    np.testing.assert_array_equal(maxima["block/attn"][0], A)


def test_a_model_that_is_the_attention_has_the_empty_path():
    assert list(recorded({"max_logits": (A,)})) == [""]
    assert list(recorded({"intermediates": {"max_logits": (A,)}})) == [""]
    assert list(recorded({"": A})) == [""]


def test_layers_in_a_list_keep_their_number():
    tree = {"layers": [{"attn": {"max_logits": (A,)}}, {"attn": {"max_logits": (B,)}}]}
    assert list(recorded(tree)) == ["layers/0/attn", "layers/1/attn"]


def test_a_tuple_of_any_length_is_maxed_not_summed():
    arrays = recorded({"attn": {"max_logits": (A, B, A)}})["attn"]
    assert len(arrays) == 3
    np.testing.assert_array_equal(merge_recordings(arrays, (2,), "attn"), [4.0, 5.0])


def test_axes_before_the_heads_are_maxed():
    x = jnp.stack([A, B, -A]).reshape(3, 1, 2)
    np.testing.assert_array_equal(merge_recordings([x], (2,), "attn"), [4.0, 5.0])
    stacked = jnp.stack([jnp.stack([A, B]), jnp.stack([B, A])])
    expected = [[4.0, 5.0], [4.0, 5.0]]
    np.testing.assert_array_equal(merge_recordings([stacked], (2, 2), "attn"), expected)


def test_recordings_may_differ_in_leading_axes():
    arrays = [jnp.stack([A, B]), -A]
    assert trailing_shape(arrays) == (2,)
    np.testing.assert_array_equal(merge_recordings(arrays, (2,), "attn"), [4.0, 5.0])


def test_recordings_of_another_head_count_are_an_error():
    with pytest.raises(ValueError, match=r"block 'attn' have shape \(3,\).*must end in \(2,\)"):
        merge_recordings([A, jnp.ones(3)], (2,), "attn")


@pytest.mark.parametrize("tree", [{}, None, A])
def test_a_tree_without_maxima_is_an_error(tree):
    with pytest.raises(ValueError, match=r"holds no maxima. Expected leaves named 'max_logits'"):
        read_maxima(tree)


@pytest.mark.parametrize(
    ("shape", "stack"), [((2, 4, 4, 4), ()), ((4, 6, 4), ()), ((3, 2, 4, 3, 4), (3,))]
)
def test_whole_logits_that_end_like_maxima_are_an_error(shape, stack):
    with pytest.raises(ValueError, match=r"may be whole logits .* take the maximum over all other"):
        merge_recordings([jnp.ones(shape)], (*stack, 4), "attn")


def test_numbers_that_are_no_array_are_an_error():
    with pytest.raises(ValueError, match=r"maxima of 'attn' are \[1.0, 2.0\]; expected arrays"):
        read_maxima({"attn": {"max_logits": [1.0, 2.0]}})


def test_a_recording_that_is_not_finite_hides_no_other():
    recordings = [jnp.array([[jnp.nan, 3.0], [7.0, jnp.inf]]), jnp.array([5.0, jnp.nan])]
    merged = merge_recordings(recordings, (2,), "attention")
    np.testing.assert_array_equal(merged, [7.0, 3.0])
    merged = merge_recordings(
        [jnp.array([[jnp.inf, -jnp.inf], [jnp.nan, -2.0]])], (2,), "attention"
    )
    np.testing.assert_array_equal(merged, [jnp.nan, -2.0])
