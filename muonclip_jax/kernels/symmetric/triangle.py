"""Which tiles of a symmetric result a kernel computes, and in which order.

A result of `m` rows falls into `T = ceil(m / size)` rows of square tiles. Tile `(i, j)` is the
transpose of `(j, i)`, so `T (T + 1) / 2` of them are enough: with 4 rows of tiles, 10 of 16. A grid
over those tiles alone needs to get from the number of a program to its tile; a table does that, and
gives the order for free. Tiles are listed in bands of a few rows, so that programs that run at the
same time read the same rows and columns.
"""

import functools

import numpy as np

# Rows of tiles in a band. Eight rows by some columns of tiles are about what runs at once on a
# GPU, and need the fewest different operand panels when they form a square.
_BAND = 8


def tiles_along(rows: int, size: int) -> int:
    """Returns how many tiles cover `rows`."""
    return -(-rows // size)


def triangle_count(tiles: int) -> int:
    """Returns how many of `tiles x tiles` tiles lie on or above the diagonal.

    Example:
        >>> triangle_count(4)
        10
    """
    return tiles * (tiles + 1) // 2


@functools.lru_cache(maxsize=256)
def triangle(rows: int, columns: int, height: float = 1.0) -> np.ndarray:
    """Lists the tiles that hold something on or above the diagonal.

    Args:
        rows: Rows of tiles.
        columns: Columns of tiles.
        height: How many times as high as wide a tile is.

    Returns:
        `(2, count)` in int32: the row and the column of every tile.

    Example:
        >>> triangle(2, 2).tolist()
        [[0, 0, 1], [0, 1, 1]]
    """
    found = [
        (row, column)
        for band in range(0, rows, _BAND)
        for column in range(columns)
        for row in range(band, min(band + _BAND, rows))
        # The tile's top right corner, in tile widths.
        if row * height < column + 1
    ]
    table = np.asarray(found, np.int32).T.copy()
    table.setflags(write=False)
    return table
