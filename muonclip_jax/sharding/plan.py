"""The plan of a tree: sequential rounds of jobs; a job assigns matrices of one shape to devices."""

import math
from dataclasses import dataclass

from muonclip_jax.matrices import Run
from muonclip_jax.sharding.blocks import Block, LocalLeaf
from muonclip_jax.sharding.mesh_shardings import Axes, Sizes


@dataclass(frozen=True)
class Exchange:
    """How devices share a stack: different matrices along some mesh axes, columns along others."""

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
    """Matrices of a job that are sharded in the same way and are sent together."""

    #: What a device holds of each.
    block: Block
    #: The matrices, as a device counts them.
    runs: tuple[Run, ...]
    #: How many of them a group of devices gets at most.
    slots: int
    #: Where each goes, `slot * groups + group`, ascending. Other places are padding.
    places: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that are worked on together, by how they are sharded."""

    shape: tuple[int, int]
    dtype: str
    buckets: tuple[Bucket, ...]
    #: For every group of devices the slots, counted over all buckets, with real matrices.
    slots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Round:
    """Jobs that share an exchange, and how many matrices of each a group of devices works on."""

    exchange: Exchange
    jobs: tuple[Job, ...]
    #: The different numbers of matrices, one for every job, and the branch of each group.
    branches: tuple[tuple[int, ...], ...]
    branch: tuple[int, ...]


@dataclass(frozen=True)
class MeshPlan:
    """The program of a device: names and sizes of the mesh axes, local leaves, and rounds."""

    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LocalLeaf, ...]
    rounds: tuple[Round, ...]
