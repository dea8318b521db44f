"""What a clip needs to know of each leaf and each block: frozen, hashable, from shapes alone."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Segment:
    """`heads * size` neighbouring features with one role, `size` a head."""

    role: str
    heads: int
    size: int


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Where the heads lie in one leaf.

    The features are the leaf's `feature_axes`, flattened in order. They are `repeat` times the
    row of `segments`; head `h` of a role is in repetition `h // heads`.
    """

    path: str
    shape: tuple[int, ...]
    stack_axes: tuple[int, ...]  # ascending
    feature_axes: tuple[int, ...]  # ascending
    segments: tuple[Segment, ...] = ()
    repeat: int = 1

    @property
    def features(self) -> tuple[int, ...]:
        """Sizes of the feature axes."""
        return tuple(self.shape[axis] for axis in self.feature_axes)

    @property
    def total(self) -> int:
        """Output features in all."""
        return math.prod(self.features)

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The other axes of one layer: a kernel's input axis."""
        known = self.stack_axes + self.feature_axes
        return tuple(axis for axis in range(len(self.shape)) if axis not in known)

    def with_roles(self, roles: Mapping[str, str]) -> "LeafPlan":
        """Returns the plan with other roles for some segments."""
        segments = (dataclasses.replace(s, role=roles.get(s.role, s.role)) for s in self.segments)
        return dataclasses.replace(self, segments=tuple(segments))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """One attention block of a tree."""

    path: str  # under which its maxima are recorded
    layout: str
    heads: int
    kv_heads: int
    head_dim: int  # features of one query and key head that clip together
    stack: tuple[int, ...]  # sizes of the stacked axes, in the kernel's order
    leaves: tuple[LeafPlan, ...]  # what a clip multiplies
    note: str = ""  # for `describe_attention`

    @property
    def maxima_shape(self) -> tuple[int, ...]:
        """The trailing shape of the block's maxima."""
        return (*self.stack, self.heads)

    def in_tree(self, block: str, paths: Mapping[str, str]) -> "BlockPlan":
        """Returns the plan of a block with whole paths in the place of names inside it."""
        leaves = (dataclasses.replace(leaf, path=paths[leaf.path]) for leaf in self.leaves)
        return dataclasses.replace(self, path=block, leaves=tuple(leaves))
