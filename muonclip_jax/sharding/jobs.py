"""From matrices and hands to a `Round`: which matrix is sent in which place."""

from collections.abc import Sequence
from typing import TypeAlias

from muonclip_jax.sharding.blocks import Block
from muonclip_jax.sharding.moves import Exchange
from muonclip_jax.sharding.plan import Group, Item, Job, Round
from muonclip_jax.sharding.schedule import Hands, branches

#: Rows, columns and dtype of a matrix.
Kind = tuple[int, int, str]
#: Matrices of one kind, with what a device holds of each.
Members: TypeAlias = "list[tuple[Block, Item]]"


def make_round(
    exchange: Exchange,
    kinds: Sequence[Kind],
    members: Sequence[Members],
    hands: Hands,
) -> Round:
    """Makes the round in which devices work on the given matrices.

    Args:
        exchange: Which axes separate matrices, and which split them.
        kinds: The kinds of matrices.
        members: For each kind, its matrices.
        hands: How many of each kind every group of devices gets.

    Returns:
        The round.
    """
    jobs = tuple(
        _job(kind, list(items), [hand[number] for hand in hands.counts])
        for number, (kind, items) in enumerate(zip(kinds, members, strict=True))
    )
    if hands.padded:
        largest = tuple(max(counts) for counts in zip(*hands.counts, strict=True))
        return Round(exchange, jobs, (largest,), (0,) * len(hands.counts))
    return Round(exchange, jobs, *branches(hands.counts))


def _job(kind: Kind, members: Members, counts: Sequence[int]) -> Job:
    """Deals the matrices of one kind, round by round, to the groups that want them."""
    hands: list[Members] = [[] for _ in counts]
    queue = iter(members)
    for depth in range(max(counts, default=0)):
        for hand, count in zip(hands, counts, strict=True):
            if depth < count:
                hand.append(next(queue))
    groups, table, offset = [], [[] for _ in counts], 0
    for block in dict.fromkeys(block for block, _ in members):
        columns = [[item for other, item in hand if other == block] for hand in hands]
        slots = max(map(len, columns))
        order = [
            column[slot] if slot < len(column) else None
            for slot in range(slots)
            for column in columns
        ]
        groups.append(Group(block, tuple(order)))
        for row, column in zip(table, columns, strict=True):
            row += range(offset, offset + len(column))
        offset += slots
    return Job(*kind, tuple(groups), tuple(map(tuple, table)))
