"""Tiles of a symmetric result: every entry is covered once, and half of them is all."""

import numpy as np
import pytest

from muonclip_jax.kernels.symmetric.tilings import TILINGS
from muonclip_jax.kernels.symmetric.triangle import triangle, triangle_count


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 32])
def test_square_tiles_are_the_upper_triangle_each_once(tiles):
    table = triangle(tiles, tiles)
    assert table.shape == (2, triangle_count(tiles))
    assert set(map(tuple, table.T.tolist())) == set(zip(*np.triu_indices(tiles), strict=True))


@pytest.mark.parametrize("rows", [256, 320, 1000, 2048])
@pytest.mark.parametrize("tiling", TILINGS)
def test_every_block_on_or_above_the_diagonal_is_in_one_tile(tiling, rows):
    blocks = -(-rows // 64)
    high, wide = tiling.height // 64, tiling.width // 64
    covered = np.zeros((blocks + high, blocks + wide), int)
    for row, column in zip(*tiling.table(rows), strict=True):
        tile = covered[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        tile += 1
        assert np.any(
            np.triu(np.ones_like(covered))[
                row * high : (row + 1) * high, column * wide : (column + 1) * wide
            ]
        ), "a tile below the diagonal"
    assert (covered[:blocks, :blocks][np.triu_indices(blocks)] == 1).all()
    assert covered.max() == 1


def test_tiles_of_one_band_follow_each_other():
    bands = triangle(16, 16)[0] // 8
    assert (np.diff(bands) >= 0).all()
