"""Counts of operations against XLA's own, and against the published formulas."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.counting import needed_flops
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
    plain = plan_polar("keller_jordan", ns_method="standard").resolve(shape, jnp.float32)
    assert needed_flops(plain, *shape) == 5 * (3 * alpha + 1) * n**3
    gram = plan_polar("keller_jordan", ns_method="gram", ns_dtype="float16")
    resolved = gram.resolve(shape, jnp.float32)
    assert len(resolved.restarts) == 1
    assert needed_flops(resolved, *shape) == (4 * 5 + 6 * alpha - 6) * n**3
