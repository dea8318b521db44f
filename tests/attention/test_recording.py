"""Maxima recorded beside an attention function of the user's own, whatever says which pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.attention import RecordingBeside
from tests.attention.cases import CASES
from tests.attention.dense import dense_attention
from tests.helpers import TOLERANCE


def _recorded(attention_fn: Any, *arguments: Any, **keywords: Any) -> tuple[Any, jax.Array]:
    seen: list[jax.Array] = []
    attend = RecordingBeside(attention_fn, lambda q, k, dtype: (q, k), seen.append)
    out = attend(*arguments, **keywords)
    (max_logits,) = seen
    return out, max_logits


def _any_keywords(query, key, value, **keywords):
    return jax.nn.dot_product_attention(query, key, value, **keywords)


MASK = jnp.asarray(np.random.default_rng(3).random((2, 4, 40, 40)) < 0.4)

MEANT: dict[str, dict[str, Any]] = {
    "causal, with a scale": {"is_causal": True, "scale": 0.3},
    "mask": {"mask": MASK},
    "bias that forbids": {"bias": jnp.where(MASK, 1.0, -jnp.inf)},
    "window": {"local_window_size": (5, 1)},
    "lengths": {
        "query_seq_lengths": jnp.asarray([7, 40]),
        "key_value_seq_lengths": jnp.asarray([30, 3]),
    },
}


@pytest.mark.parametrize("how", ["bound", "passed", "bound to keywords"])
@pytest.mark.parametrize("name", MEANT)
def test_what_says_which_pairs_is_understood_wherever_it_stands(name, how):
    query, key, value, _ = CASES["plain"].make()
    function: Any = _any_keywords if how == "bound to keywords" else jax.nn.dot_product_attention
    keywords = MEANT[name]
    if how != "passed":
        function, keywords = functools.partial(function, **keywords), {}
    out, max_logits = _recorded(function, query, key, value, **keywords)
    dense = dense_attention(query, key, value, **MEANT[name])
    np.testing.assert_allclose(max_logits, dense.max_logits, rtol=TOLERANCE["float32"])
    np.testing.assert_array_equal(out, function(query, key, value, **keywords))


def test_defaults_count_and_what_is_passed_comes_before_them():
    query, key, value, _ = CASES["plain"].make()

    def causal(query, key, value, mask=None, is_causal=True):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)

    _, max_logits = _recorded(causal, query, key, value)
    expected = dense_attention(query, key, is_causal=True).max_logits
    np.testing.assert_allclose(max_logits, expected, rtol=TOLERANCE["float32"])
    everything = dense_attention(query, key).max_logits
    assert (everything > expected).any()
    for function in (causal, functools.partial(causal, is_causal=True)):
        _, max_logits = _recorded(function, query, key, value, is_causal=False)
        np.testing.assert_allclose(max_logits, everything, rtol=TOLERANCE["float32"])
