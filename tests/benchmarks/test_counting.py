"""Counts of needed operations against the published formulas."""

import jax.numpy as jnp
import pytest

from benchmarks.counting import needed_flops
from muonclip_jax.newton_schulz import plan_polar


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
