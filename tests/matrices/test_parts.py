"""Parts against NumPy's own slicing: every split, and the way back bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.matrices import from_matrices, plan_leaf, to_matrices
from muonclip_jax.routing import MatrixSpec, Split, normalize_spec


def _array(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# name -> (array, spec, the matrices as NumPy slices write them)
_QKV = _array(4, 2 * 3 * 5)
_GROUPED = _array(6, 2 * (3 + 2) * 4)  # two groups of three query heads, a key and a value head
_KV_B = _array(8, 2, 3 + 4)
_STACKED = _array(3, 4, 2, 5)
CASES = {
    "plain": (_array(4, 6), MatrixSpec(), [_array(4, 6)[None]]),
    "attention query": (
        _array(4, 2, 5),
        MatrixSpec((0, (1, 2))),
        [_array(4, 2, 5).reshape(1, 4, 10)],
    ),
    "attention output": (
        _array(2, 5, 4),
        MatrixSpec(((0, 1), 2)),
        [_array(2, 5, 4).reshape(1, 10, 4)],
    ),
    "one matrix a head": (
        _array(4, 2, 5),
        MatrixSpec((0, 2)),
        [np.moveaxis(_array(4, 2, 5), 1, 0)],
    ),
    "stacked layers": (_STACKED, MatrixSpec((1, (2, 3))), [_STACKED.reshape(3, 4, 10)]),
    "stacked on axis 1": (
        _STACKED,
        MatrixSpec((0, (2, 3))),
        [np.moveaxis(_STACKED, 1, 0).reshape(4, 3, 10)],
    ),
    "output before input": (_array(4, 6), MatrixSpec((1, 0)), [_array(4, 6).T[None]]),
    "concatenated qkv": (
        _QKV,
        MatrixSpec((0, 1), (Split(1, (10, 10, 10)),)),
        [_QKV[None, :, :10], _QKV[None, :, 10:20], _QKV[None, :, 20:]],
    ),
    "qkv by head": (
        _QKV,
        MatrixSpec((0, 1), (Split(1, (1, 1, 1), view=(2, 3, 5), along=1),)),
        [_QKV.reshape(4, 2, 3, 5)[:, :, i].reshape(1, 4, 10) for i in range(3)],
    ),
    "qkv by group": (
        _GROUPED,
        MatrixSpec((0, 1), (Split(1, (3, 1, 1), view=(2, 5, 4), along=1),)),
        [
            _GROUPED.reshape(6, 2, 5, 4)[:, :, a:b].reshape(1, 6, -1)
            for a, b in ((0, 3), (3, 4), (4, 5))
        ],
    ),
    "latent kv": (
        _KV_B,
        MatrixSpec((0, (1, 2)), (Split(2, (3, 4)),)),
        [_KV_B[:, :, :3].reshape(1, 8, 6), _KV_B[:, :, 3:].reshape(1, 8, 8)],
    ),
    "two splits": (
        _array(4, 6),
        MatrixSpec((0, 1), (Split(0, (1, 3)), Split(1, (2, 4)))),
        [
            _array(4, 6)[None, :1, :2],
            _array(4, 6)[None, :1, 2:],
            _array(4, 6)[None, 1:, :2],
            _array(4, 6)[None, 1:, 2:],
        ],
    ),
    "no entries": (_array(0, 6), MatrixSpec(), [_array(0, 6)[None]]),
}


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_what_slicing_gives_and_back_again_bit_for_bit(name: str):
    x, spec, expected = CASES[name]
    plan = plan_leaf(x.shape, normalize_spec(spec, x.shape))
    got = to_matrices(jnp.asarray(x), plan)
    for matrix, reference, part in zip(got, expected, plan.parts, strict=True):
        np.testing.assert_array_equal(matrix, reference)
        assert reference.shape == (part.count, part.fan_in, part.fan_out)
    np.testing.assert_array_equal(from_matrices(got, plan), x)
