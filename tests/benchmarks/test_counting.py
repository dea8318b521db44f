"""Counts of operations against XLA's own, and against the published formulas."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.counting import count_products, product_flops, seconds_at
from muonclip_jax.newton_schulz import apply_polar, plan_polar

# Below the size from which a CPU leaves out blocks of symmetric products; large enough for entry by
# entry work to be less than the smallest product, 3 % of all.
SHAPE = (192, 384)
SETTINGS = [
    {"ns_coeffs": "keller_jordan", "ns_method": "standard"},
    {"ns_coeffs": "keller_jordan", "ns_method": "gram", "ns_dtype": "float16"},
    {"ns_coeffs": "you", "ns_method": "gram", "ns_dtype": "float32"},
    {"ns_coeffs": "polar_express", "ns_method": "gram", "ns_dtype": "float16"},
    {"ns_coeffs": (1.5, -0.5, 0.0), "ns_steps": 4, "ns_method": "standard"},
    {"ns_coeffs": (1.5, -0.5, 0.0), "ns_steps": 4, "ns_method": "gram"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_flops_are_those_that_xla_counts(settings):
    plan = plan_polar(**settings)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    lowered = jax.jit(functools.partial(apply_polar, plan)).lower(x)
    analysis: Any = lowered.cost_analysis()
    counted = plan.resolve(SHAPE, jnp.float32).flops
    assert counted <= analysis["flops"] <= 1.03 * counted


@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_needed_flops_are_the_published_ones(alpha):
    """`T (3 alpha + 1)` and, with one restart, `4 T + 6 alpha - 6`, in units of n^3."""
    n = 64
    shape = (n, alpha * n)
    flops = product_flops(*shape)
    plain = plan_polar("keller_jordan", ns_method="standard").resolve(shape, jnp.float32)
    assert seconds_at(plain, flops, needed=True) == 5 * (3 * alpha + 1) * n**3
    gram = plan_polar("keller_jordan", ns_method="gram", ns_dtype="float16")
    resolved = gram.resolve(shape, jnp.float32)
    assert len(resolved.restarts) == 1
    assert seconds_at(resolved, flops, needed=True) == (4 * 5 + 6 * alpha - 6) * n**3


def test_seconds_of_the_products_alone():
    resolved = plan_polar("keller_jordan", ns_method="standard").resolve((4, 8), jnp.float32)
    seconds = {"gram": 1.0, "square": 10.0, "update": 100.0}
    assert seconds_at(resolved, seconds) == 555.0
    assert seconds_at(resolved, seconds, needed=True) == 527.5


def test_an_oracle_has_no_products():
    resolved = plan_polar(ns_method="svd").resolve((4, 8), jnp.float32)
    with pytest.raises(ValueError, match="svd"):
        count_products(resolved)
