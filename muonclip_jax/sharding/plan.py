"""The plan as values: rounds of jobs, which say what matrix goes to which device; no arrays."""

from dataclasses import dataclass

from muonclip_jax.sharding.blocks import Axes, Block
from muonclip_jax.sharding.cut import Cut
from muonclip_jax.sharding.local import LocalLeaf
from muonclip_jax.sharding.moves import Exchange


@dataclass(frozen=True)
class Item:
    """One matrix: number `index` of a part of a leaf, as this device counts."""

    leaf: int
    part: int
    index: int


@dataclass(frozen=True)
class Group:
    """Matrices of a job that devices hold in the same way, in the order in which they are sent.

    Attributes:
        block: What a device holds of each.
        order: Entry `s * groups + p` goes to group of devices `p`; None is padding.
    """

    block: Block
    order: tuple[Item | None, ...]


@dataclass(frozen=True)
class Job:
    """Matrices of one shape that are exchanged and worked on together.

    Attributes:
        rows: Rows of each matrix.
        columns: Columns of each matrix.
        dtype: Their dtype, by name.
        groups: The matrices, by how they are held.
        table: For every group of devices the slots it received real matrices in, over all `groups`.
    """

    rows: int
    columns: int
    dtype: str
    groups: tuple[Group, ...]
    table: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Round:
    """Jobs that share an exchange, and how many matrices of each a group of devices works on.

    Attributes:
        exchange: Which axes separate matrices, and which split them.
        jobs: The jobs.
        branches: The different hands: a number of matrices for every job.
        branch: For each group of devices, its branch.
    """

    exchange: Exchange
    jobs: tuple[Job, ...]
    branches: tuple[tuple[int, ...], ...]
    branch: tuple[int, ...]


@dataclass(frozen=True)
class DistributionPlan:
    """Everything that a device has to do.

    Attributes:
        sizes: Names and sizes of the mesh axes.
        leaves: What it holds of each leaf.
        gathered: For each leaf `(dimension, axes)` along which its result is gathered in the end.
        rounds: What it works on.
        busiest: What the busiest device does, in floating-point operations, what it sends included.
        mean: The mean over all devices if splitting matrices cost nothing.
        cut: What makes two axes of one of the mesh, or None.
    """

    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[LocalLeaf, ...]
    gathered: tuple[tuple[tuple[int, Axes], ...], ...]
    rounds: tuple[Round, ...]
    busiest: float = 0.0
    mean: float = 0.0
    cut: Cut | None = None
