"""How the Hopper kernels cut a result, and which cut is fastest for a size.

A GPU of 132 processors takes as long for one tile as for 132, so what counts is rounds: 136 tiles
of 128 x 128, the upper triangle at 2048 rows, are two of them, as many as all 256 tiles need where
two share a processor's round.
"""

from dataclasses import dataclass

from muonclip_jax.kernels.symmetric.triangle import tiles_along, triangle

#: Multiprocessors of an H100 and an H200.
MULTIPROCESSORS = 132
#: The grain of the result, and how much of the depth a stage holds: one swizzled row of 128 bytes.
BLOCK = 64


@dataclass(frozen=True)
class Tiling:
    """How a program's tile falls to its warpgroups.

    Attributes:
        warpgroups: How many multiply, each some rows of the tile.
        rows: Blocks of 64 rows that each of them computes.
        columns: Blocks of 64 columns that each of them computes.
        stages: Length of the ring of operands.
        rate: How fast it multiplies, relatively. Wide tiles read less shared memory a product.
    """

    warpgroups: int
    rows: int
    columns: int
    stages: int
    rate: float

    @property
    def height(self) -> int:
        """Rows of the tile."""
        return self.warpgroups * self.rows * BLOCK

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return self.columns * BLOCK

    def table(self, rows: int) -> tuple[list[int], list[int]]:
        """Lists rows and columns of the tiles that hold something of the upper triangle."""
        grain = tiles_along(rows, BLOCK)
        high, wide = self.height // BLOCK, self.columns
        kept = triangle(tiles_along(grain, high), tiles_along(grain, wide), high / wide)
        return kept[0].tolist(), kept[1].tolist()

    def everything(self, rows: int, columns: int) -> tuple[list[int], list[int]]:
        """Lists rows and columns of all tiles of a result that is not symmetric."""
        down, across = tiles_along(rows, self.height), tiles_along(columns, self.width)
        pairs = [(i, j) for j in range(across) for i in range(down)]
        return [i for i, _ in pairs], [j for _, j in pairs]


#: What can be chosen from; benchmarks/kernel_speed.py times each.
TILINGS = (
    Tiling(warpgroups=2, rows=2, columns=2, stages=3, rate=1.0),
    Tiling(warpgroups=3, rows=1, columns=2, stages=3, rate=0.92),
    Tiling(warpgroups=2, rows=1, columns=2, stages=4, rate=0.87),
)


def waves(tiling: Tiling, batch: int, rows: int) -> float:
    """Estimates the time of a product, in that of a 128 x 128 tile at rate 1."""
    tiles = batch * len(tiling.table(rows)[0])
    area = tiling.height * tiling.width / 128**2
    return tiles_along(tiles, MULTIPROCESSORS) * area / tiling.rate


def choose_tiling(batch: int, rows: int) -> Tiling:
    """Returns the tiling that needs the least time, counted in whole waves of programs."""
    return min(TILINGS, key=lambda tiling: waves(tiling, batch, rows))
