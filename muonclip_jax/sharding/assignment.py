"""The number of matrices of each shape per group of devices.

All devices run one program, so round-robin assignment pads 13 equal matrices on 8 devices to 16,
and three devices process padding half of the time. With several shapes, the remainders of all are
assigned together, longest-first, and each device runs the branch of the program for its counts.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: More branches than this make the program longer than the balance is worth.
MAX_BRANCHES = 8


@dataclass(frozen=True)
class Assignment:
    """The number of matrices of every kind per group of devices, `counts[group][kind]`."""

    counts: tuple[tuple[int, ...], ...]
    #: Cost of the busiest group.
    makespan: float


def assign_round_robin(count: int, cost: float, groups: int) -> Assignment:
    """Assigns equal matrices evenly: five on three groups are 2, 2 and 1."""
    most, full = -(-count // groups), count % groups or groups
    return Assignment(((most,),) * full + ((most - 1,),) * (groups - full), most * cost)


def assign_longest_first(
    counts: Sequence[int], costs: Sequence[float], groups: int, limits: Sequence[int]
) -> Assignment | None:
    """Assigns the costliest matrices first, each to the group with the least work so far.

    `counts`, `costs` and `limits` have an entry for each kind of matrix: their number, the cost of
    one, and the maximum number per group. Returns None if the groups would run more than
    `MAX_BRANCHES` different branches.

    Example:
        >>> assign_longest_first([3, 2], [1.0, 2.0], 4, [3, 3])
        Assignment(counts=((2, 0), (1, 0), (0, 1), (0, 1)), makespan=2.0)

    References:
        Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    assigned = [[0] * len(counts) for _ in range(groups)]
    loads = [(0.0, group) for group in range(groups)]
    for kind in sorted(range(len(counts)), key=lambda kind: -costs[kind]):
        full: list[tuple[float, int]] = []
        for _ in range(counts[kind]):
            load, group = heapq.heappop(loads)
            assigned[group][kind] += 1
            entry = (load + costs[kind], group)
            if assigned[group][kind] < limits[kind]:
                heapq.heappush(loads, entry)
            else:
                full.append(entry)
        loads = full + loads
        heapq.heapify(loads)
    # Equal groups side by side keep consecutive matrices together.
    assigned.sort(reverse=True)
    if len(set(map(tuple, assigned))) > MAX_BRANCHES:
        return None
    return Assignment(tuple(map(tuple, assigned)), max(loads)[0])


def branches_of(
    counts: Sequence[tuple[int, ...]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Returns the different rows of counts, most frequent first, and each group's index among them.

    Groups without matrices run the most frequent branch: waiting would not be faster, and one
    branch alone needs no conditional.
    """
    branches = [row for row, _ in Counter(row for row in counts if any(row)).most_common()]
    number = {row: index for index, row in enumerate(branches)}
    return tuple(branches), tuple(number.get(row, 0) for row in counts)
