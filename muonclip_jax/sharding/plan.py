"""The plan of a tree as values: rounds of jobs, which say which matrix goes to which devices."""

import math
from dataclasses import dataclass

from muonclip_jax.matrices import Run
from muonclip_jax.sharding.blocks import Block, LocalLeaf
from muonclip_jax.sharding.mesh_shardings import Axes, Sizes


@dataclass(frozen=True)
class Exchange:
    """How devices share a stack of matrices.

    Attributes:
        matrix_axes: Mesh axes along which devices work on different matrices.
        column_axes: Mesh axes along which devices work on different columns of the same matrices.
    """

    matrix_axes: Axes
    column_axes: Axes

    def groups(self, sizes: Sizes) -> int:
        """How many groups of devices there are, each with matrices of its own."""
        return math.prod(sizes[axis] for axis in self.matrix_axes)

    def ways(self, sizes: Sizes) -> int:
        """Over how many devices each matrix is split."""
        return math.prod(sizes[axis] for axis in self.column_axes)


@dataclass(frozen=True)
class Bucket:
    """Matrices of a job that are sharded in the same way and are sent together.

    Attributes:
        block: What a device holds of each.
        runs: The matrices, as a device counts them.
        slots: How many of them a group of devices gets at most.
        places: Where each goes, `slot * groups + group`, ascending. Other places are padding.
    """

    block: Block
    runs: tuple[Run, ...]
    slots: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that are exchanged and worked on together.

    Attributes:
        shape: Rows and columns of each matrix.
        dtype: Their dtype, by name.
        buckets: The matrices, by how they are sharded.
        slots: For every group of devices the slots, counted over all buckets, with real matrices.
    """

    shape: tuple[int, int]
    dtype: str
    buckets: tuple[Bucket, ...]
    slots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Round:
    """Jobs that share an exchange, and how many matrices of each a group of devices works on.

    Attributes:
        exchange: Which axes separate matrices, and which split them.
        jobs: The jobs.
        branches: The different numbers of matrices, one for every job.
        branch: For each group of devices, its branch.
    """

    exchange: Exchange
    jobs: tuple[Job, ...]
    branches: tuple[tuple[int, ...], ...]
    branch: tuple[int, ...]


@dataclass(frozen=True)
class MeshPlan:
    """What a device has to do: names and sizes of the mesh axes, its leaves, its rounds of work."""

    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LocalLeaf, ...]
    rounds: tuple[Round, ...]
