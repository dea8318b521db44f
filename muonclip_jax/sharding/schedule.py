"""Who works on what: unequal matrices over devices that all run one program.

One program runs everywhere, so a stack of 13 matrices on 8 devices is padded to 16, and three
devices work for nothing. With stacks of several shapes the leftovers of one fill the gaps of
another: full rounds (a matrix of the shape for each device) run as they are, but for the last ones,
and what is left of all shapes is handed out together, longest processing time first. A device then
runs the branch of the program that its hand calls for.

Where there are fewer matrices than devices, a group of devices can share each one by columns. That
costs two collectives of the small Gram matrix a step, so it is done where the devices gain more
than that.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: More different hands than this make the program longer than the balance is worth.
MAX_BRANCHES = 8


@dataclass(frozen=True)
class Hands:
    """What each group of devices gets of every kind of matrix.

    Attributes:
        counts: `counts[group][kind]`.
        makespan: Cost of the fullest hand.
        padded: Whether all groups compute the largest number of every kind.
    """

    counts: tuple[tuple[int, ...], ...]
    makespan: float
    padded: bool = False


def deal(
    counts: Sequence[int],
    costs: Sequence[float],
    groups: int,
    limits: Sequence[int] | None = None,
) -> Hands:
    """Deals matrices to groups of devices: the costliest first, to whoever has least.

    Args:
        counts: How many matrices there are of each kind.
        costs: What one of each kind costs.
        groups: How many groups there are.
        limits: How many of each kind a group may get, enough for all of them; None is any number.

    Returns:
        The hands; those of `spread` where there are more than `MAX_BRANCHES` different ones.

    Example:
        >>> hands = deal([3, 2], [1.0, 2.0], 4)
        >>> hands.counts, hands.makespan
        (((2, 0), (1, 0), (0, 1), (0, 1)), 2.0)
        >>> deal([3, 2], [1.0, 2.0], 4, limits=[1, 1]).counts
        ((1, 1), (1, 0), (1, 0), (0, 1))

    References:
        Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    hands = [[0] * len(counts) for _ in range(groups)]
    loads = [(0.0, group) for group in range(groups)]
    for kind in sorted(range(len(counts)), key=lambda kind: -costs[kind]):
        full: list[tuple[float, int]] = []
        for _ in range(counts[kind]):
            load, group = heapq.heappop(loads)
            hands[group][kind] += 1
            has_all = limits is not None and hands[group][kind] >= limits[kind]
            if has_all:
                full.append((load + costs[kind], group))
            else:
                heapq.heappush(loads, (load + costs[kind], group))
        for entry in full:
            heapq.heappush(loads, entry)
    # Equal hands side by side keep consecutive matrices together.
    hands.sort(reverse=True)
    if len({tuple(hand) for hand in hands}) > MAX_BRANCHES:
        return spread(counts, costs, groups)
    return Hands(tuple(map(tuple, hands)), max(loads)[0])


def spread(counts: Sequence[int], costs: Sequence[float], groups: int) -> Hands:
    """Deals every kind evenly by itself; all groups compute as many as the fullest of them."""
    hands = [[0] * len(counts) for _ in range(groups)]
    start = 0
    for kind, count in enumerate(counts):
        for number in range(count):
            hands[(start + number) % groups][kind] += 1
        start += count
    makespan = sum(
        math.ceil(count / groups) * cost for count, cost in zip(counts, costs, strict=True)
    )
    return Hands(tuple(map(tuple, hands)), float(makespan), padded=True)


def branches(
    hands: Sequence[tuple[int, ...]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Returns the different hands, most frequent first, and for each group its number.

    Groups with nothing to do run the most frequent branch: waiting would not be faster, and one
    branch alone needs no branching at all.

    Example:
        >>> branches([(1, 0), (0, 0), (1, 0), (0, 2)])
        (((1, 0), (0, 2)), (0, 0, 0, 1))
    """
    frequent = [hand for hand, _ in Counter(hand for hand in hands if any(hand)).most_common()]
    number = {hand: index for index, hand in enumerate(frequent)}
    return tuple(frequent), tuple(number.get(hand, 0) for hand in hands)
