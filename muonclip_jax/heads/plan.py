"""What a clip needs to know of each leaf and each block: frozen, hashable, from shapes alone."""

import dataclasses


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

    Args:
        path: The leaf's path in the tree.
        shape: Its shape.
        stack_axes: Axes of stacked layers and pipeline stages, ascending.
        feature_axes: Axes of output features, ascending.
        segments: What lies along the features.
        repeat: How often the segments repeat.
    """

    path: str
    shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    feature_axes: tuple[int, ...]
    segments: tuple[Segment, ...]
    repeat: int


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """One attention block of a tree.

    Args:
        path: The block's path, the one under which its maxima are recorded.
        layout: The layout's name.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Features of one query and key head that clip together.
        stack: Sizes of the stacked axes, in the kernel's order.
        leaves: The leaves that a clip multiplies.
        note: What a reader of `describe_attention` should know besides.
    """

    path: str
    layout: str
    heads: int
    kv_heads: int
    head_dim: int
    stack: tuple[int, ...]
    leaves: tuple[LeafPlan, ...]
    note: str = ""

    @property
    def maxima_shape(self) -> tuple[int, ...]:
        """The trailing shape of the block's maxima."""
        return (*self.stack, self.heads)
