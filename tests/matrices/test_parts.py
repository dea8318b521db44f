"""Parts against NumPy's own slicing: every split, and the way back bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.matrices.parts import from_matrices, plan_leaf, to_matrices
from muonclip_jax.routing import MatrixSpec, Split, normalize_spec


def _array(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# name -> (array, spec, the matrices as NumPy slices write them)
_QKV = _array(4, 2 * 3 * 5)
_GROUPED = _array(6, 2 * (3 + 2) * 4)  # two groups of three query heads, a key and a value head
_KV_B = _array(8, 2, 3 + 4)
_STACKED = _array(3, 4, 2, 5)
_PLAIN, _QUERY, _OUT, _LAST = _array(4, 6), _array(4, 2, 5), _array(2, 5, 4), _array(4, 5, 3)
_EVERY_HEAD, _EVERY_GROUP = ((1, 1, 1), (2, 3, 5), 1), ((3, 1, 1), (2, 5, 4), 1)
CASES = {
    "attention query": (_QUERY, MatrixSpec((0, (1, 2))), [_QUERY.reshape(1, 4, 10)]),
    "attention output": (_OUT, MatrixSpec(((0, 1), 2)), [_OUT.reshape(1, 10, 4)]),
    "one matrix a head": (_QUERY, MatrixSpec((0, 2)), [np.moveaxis(_QUERY, 1, 0)]),
    "stacked layers": (_STACKED, MatrixSpec((1, (2, 3))), [_STACKED.reshape(3, 4, 10)]),
    "stacked on axis 1": (
        _STACKED,
        MatrixSpec((0, (2, 3))),
        [np.moveaxis(_STACKED, 1, 0).reshape(4, 3, 10)],
    ),
    "stacked last": (_LAST, MatrixSpec((0, 1)), [np.moveaxis(_LAST, 2, 0)]),
    "output before input": (_PLAIN, MatrixSpec((1, 0)), [_PLAIN.T[None]]),
    "concatenated qkv": (
        _QKV,
        MatrixSpec((0, 1), Split(1, (10, 10, 10))),
        [_QKV[None, :, at : at + 10] for at in (0, 10, 20)],
    ),
    "qkv by head": (
        _QKV,
        MatrixSpec((0, 1), Split(1, *_EVERY_HEAD)),
        [_QKV.reshape(4, 2, 3, 5)[:, :, i].reshape(1, 4, 10) for i in range(3)],
    ),
    "qkv by group": (
        _GROUPED,
        MatrixSpec((0, 1), Split(1, *_EVERY_GROUP)),
        [
            _GROUPED.reshape(6, 2, 5, 4)[:, :, a:b].reshape(1, 6, -1)
            for a, b in ((0, 3), (3, 4), (4, 5))
        ],
    ),
    "latent kv": (
        _KV_B,
        MatrixSpec((0, (1, 2)), Split(2, (3, 4))),
        [_KV_B[:, :, :3].reshape(1, 8, 6), _KV_B[:, :, 3:].reshape(1, 8, 8)],
    ),
    "two splits": (
        _PLAIN,
        MatrixSpec((0, 1), (Split(0, (1, 3)), Split(1, (2, 4)))),
        [
            _PLAIN[None, rows, columns]
            for rows in (slice(1), slice(1, 4))
            for columns in (slice(2), slice(2, 6))
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
