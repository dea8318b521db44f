"""The matrix products by XLA, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.newton_schulz import products
from muonclip_jax.newton_schulz.products import gram, matmul_add, symmetric_product
from tests.helpers import TOLERANCE


def _draw(*shape, dtype="float32", seed=0):
    real, imaginary = np.random.default_rng(seed).standard_normal((2, *shape))
    x = real + 1j * imaginary if dtype.startswith("complex") else real
    return jnp.asarray(x / np.sqrt(shape[-1]), dtype)


def _check(actual, expected, dtype):
    scale = np.abs(expected).max()
    found = np.asarray(actual).astype(expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def _exact(x):
    return np.asarray(x).astype(np.complex128)


# From three rows on, a CPU computes 2 x 2 blocks: odd and even numbers of rows.
@pytest.mark.parametrize("split_from", [2, 512])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (6, 4), (0, 3, 4), (1, 1)])
def test_hermitian_products_are_what_float64_says(shape, dtype, split_from, monkeypatch):
    monkeypatch.setattr(products, "SPLIT_FROM", split_from)
    x = _draw(*shape, dtype=dtype)
    r = gram(x)
    assert r.dtype == x.dtype
    if not x.size:
        assert r.shape == (*shape[:-1], shape[-2])
        return
    _check(r, _exact(x) @ np.conj(np.swapaxes(_exact(x), -1, -2)), dtype)
    wide = gram(x, out_dtype=products.accumulator(x.dtype))
    assert wide.dtype == products.accumulator(x.dtype)
    # The square of a Hermitian matrix, and its product with that.
    for y in (r, symmetric_product(r, r)):
        expected = 2 * _exact(r) @ _exact(y) - 3 * _exact(r)
        _check(symmetric_product(r, y, r, alpha=2.0, beta=-3.0), expected, dtype)


def test_matmul_add_is_what_float64_says():
    x, y, addend = _draw(2, 5, 6), _draw(2, 6, 7, seed=1), _draw(2, 5, 7, seed=2)
    expected = 2 * _exact(x) @ _exact(y) - _exact(addend)
    _check(matmul_add(x, y, addend, 2.0, -1.0), expected, "float32")
