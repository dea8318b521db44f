"""What benchmarks measure with: quality, needed operations, shapes of models, stored numbers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from benchmarks.harness import compact, interleave, ratio, summary
from benchmarks.matrices import Reference, diverges, needed_flops, over_all
from benchmarks.models import MODELS, layers_of_256
from muonclip_jax.newton_schulz import plan_polar


def test_known_singular_values():
    x = np.random.default_rng(0).normal(size=(2, 6, 9))
    left, _, right = np.linalg.svd(x, full_matrices=False)
    for quality in Reference(x).quality(left @ right):  # the polar factor itself is perfect
        assert tuple(quality.values()) == pytest.approx((1, 0, 1), abs=1e-7)
    x = np.diag([3.0, 2.0, 1.0])[None]
    quality = Reference(x).quality(np.diag([1.2, 0.9, 0.5])[None])[0]
    assert quality["largest"] == pytest.approx(1.2)
    assert quality["rms"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.25) / 3))
    assert quality["cosine"] == pytest.approx(2.6 / math.sqrt(3 * (1.44 + 0.81 + 0.25)))
    x = np.diag([1.0, 0.0])[None]  # a direction that the matrix does not have is not asked for
    quality = Reference(x).quality(np.diag([1.0, 0.0])[None])[0]
    assert quality["rms"] == pytest.approx(0, abs=1e-7)


def test_what_is_not_finite_or_too_large_diverges():
    reference = Reference(np.eye(2)[None])
    for bad in (np.full((1, 2, 2), np.nan), 1.7 * np.eye(2)[None]):
        assert diverges(reference.quality(bad)[0])
    good = reference.quality(1.2 * np.eye(2)[None])
    assert not diverges(good[0])
    assert diverges(over_all(good + reference.quality(np.full((1, 2, 2), np.inf))))


@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_needed_flops_are_the_published_ones(alpha):
    """`T (3 alpha + 1)` and, with one restart, `4 T + 6 alpha - 6`, in units of n^3."""
    n = 64
    shape = (n, alpha * n)
    plain = plan_polar("keller_jordan", ns_method="standard").resolve(shape, jnp.float32)
    assert needed_flops(plain, *shape) == 5 * (3 * alpha + 1) * n**3
    gram = plan_polar("keller_jordan", ns_method="gram", ns_dtype="float16")
    resolved = gram.resolve(shape, jnp.float32)
    assert len(resolved.restarts) == 1
    assert needed_flops(resolved, *shape) == (4 * 5 + 6 * alpha - 6) * n**3


def test_models_have_their_published_sizes_and_the_library_s_labels():
    # Embedding and head are two leaves here and one there; norms and biases are left out.
    for name, published in (
        ("gpt2-small", 124.4e6 + 768 * 50257),
        ("1.3b", 1.3158e9 + 2048 * 50257),
    ):
        tree, numbers = MODELS[name].tree(jnp.bfloat16), MODELS[name].dimension_numbers()
        found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        assert found == pytest.approx(published, rel=0.002)
        labels = jax.tree.leaves(mc.label_params(tree))
        specs = jax.tree.structure(tree).flatten_up_to(numbers)
        assert labels == ["adamw" if spec is None else "muon" for spec in specs]
    assert layers_of_256(48).matrices() == {(256, 256): 192, (256, 1024): 96}


def test_contenders_take_turns_in_both_orders():
    calls: list[str] = []
    seconds = interleave({n: lambda n=n: calls.append(n) for n in "ab"}, 2, warmup=1)
    assert calls == list("baabba")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_summaries_and_stored_rows_that_are_a_line_each():
    assert summary([5.0, 1.0, 2.0, 3.0]) == {"median": 2.5, "range": [1.0, 5.0]}
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3.0, "range": [2.0, 4.0]}
    content = {"machine": {"cores": 2}, "rows": [{"a": 1 / 3, "b": None}, {"a": [1e-9, 2]}]}
    text = compact(content | {"by name": {"x": {"a": 1}, "y": {"a": 2}}, "empty": []})
    assert len(text.splitlines()) == 12
    assert json.loads(text)["rows"] == [{"a": 0.33333333, "b": None}, {"a": [1e-9, 2]}]
