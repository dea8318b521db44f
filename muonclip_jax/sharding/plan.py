"""The plan of a tree: sequential rounds of jobs; a job assigns matrices of one shape to devices."""

import math
from dataclasses import dataclass

from muonclip_jax.matrices import Run
from muonclip_jax.sharding.blocks import Block, LocalLeaf
from muonclip_jax.sharding.mesh_shardings import Axes, Sizes


@dataclass(frozen=True)
class Exchange:
    """Mesh axes over which a stack of matrices is distributed.

    Attributes:
        matrix_axes: Mesh axes along which devices process different matrices.
        column_axes: Mesh axes along which devices process different columns of the same matrices.
    """

    matrix_axes: Axes
    column_axes: Axes

    def groups(self, sizes: Sizes) -> int:
        """Number of groups of devices; each group has its own matrices."""
        return math.prod(sizes[axis] for axis in self.matrix_axes)

    def ways(self, sizes: Sizes) -> int:
        """Number of devices over which each matrix is split."""
        return math.prod(sizes[axis] for axis in self.column_axes)


@dataclass(frozen=True)
class Bucket:
    """Matrices of a job with the same sharding, which are sent in one collective.

    Attributes:
        block: The block of each matrix on one device.
        runs: The matrices, in local numbering.
        slots: Maximum number of them per group of devices.
        places: Destination of each, `slot * groups + group`, ascending. Other places are padding.
    """

    block: Block
    runs: tuple[Run, ...]
    slots: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that are sent and processed together.

    Attributes:
        shape: Rows and columns of each matrix.
        dtype: Their dtype, by name.
        buckets: The matrices, by sharding.
        slots: For every group of devices the slots, over all buckets, that are not padding.
    """

    shape: tuple[int, int]
    dtype: str
    buckets: tuple[Bucket, ...]
    slots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Round:
    """Jobs with the same exchange, and the number of matrices of each job per group of devices.

    Attributes:
        exchange: The mesh axes for matrices and for columns.
        jobs: The jobs.
        branches: The different tuples of matrix counts, one count per job.
        branch: For each group of devices, the index of its branch.
    """

    exchange: Exchange
    jobs: tuple[Job, ...]
    branches: tuple[tuple[int, ...], ...]
    branch: tuple[int, ...]


@dataclass(frozen=True)
class MeshPlan:
    """The program of a device: names and sizes of the mesh axes, local leaves, and rounds."""

    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LocalLeaf, ...]
    rounds: tuple[Round, ...]
