"""Which devices a collective joins, in each of the ways in which XLA writes it down.

    replica_groups={{0,2},{1,3}}              the groups themselves
    replica_groups=[2,2]<=[2,2]T(1,0)         the rows of an array that counts up, transposed here
    replica_groups=mesh['x'=2,'y'=2] {'x'}    a mesh, and the axes that a group runs along
    replica_groups={}                         one group of all devices
    source_target_pairs={{0,1},{1,0}}         who sends to whom

The first three say the same. A mesh whose devices do not count up lists them, `mesh['x'=2,'y'=2],
device_ids=(3,1,0,2) {'x'}`, or writes them as such an array, `device_ids=([2,2]T(1,0))`. An axis
may be taken in part: `'x':(2)3` is the middle one of x seen as 2 by 3 by what remains.
"""

import itertools
import math
import re

import numpy as np

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_ROWS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'?([^',=]+)'?=(\d+)")
_TAKEN = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")


def read_groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """Returns the groups of one collective, from what follows its operands.

    Example:
        >>> read_groups("replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}", 4)
        [(0, 2), (1, 3)]
    """
    if listed := _LISTED.search(attributes):
        found = [tuple(_numbers(group)) for group in re.findall(r"\d[\d,]*", listed[1])]
        return found if found or "pairs" in listed[0] else [tuple(range(devices))]
    if rows := _ROWS.search(attributes):
        return _tuples(_array(rows[3]).reshape(int(rows[1]), int(rows[2])))
    if mesh := _MESH.search(attributes):
        return _tuples(_along_axes(*mesh.groups()))
    if "replica_groups=" in attributes:
        raise ValueError(f"The groups of devices in {attributes!r} are written in an unknown way.")
    return [tuple(range(devices))]


def _tuples(groups: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(group) for group in groups.tolist()]


def _array(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`, what counts up in an array and is transposed; or a list `3,1,0,2`."""
    shape, axes = re.search(r"\[([\d,]+)\]", text), re.search(r"T\(([\d,]+)\)", text)
    if shape is None:
        return np.array(_numbers(text))
    counted = np.arange(math.prod(_numbers(shape[1]))).reshape(_numbers(shape[1]))
    return counted.transpose(_numbers(axes[1])) if axes else counted


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _along_axes(mesh: str, order: str | None, axes: str) -> np.ndarray:
    """Groups along axes of a mesh, or along parts of axes; the last one named varies fastest."""
    sizes = {name: int(size) for name, size in _AXIS.findall(mesh)}
    taken = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in _TAKEN.findall(axes)
    ]
    # Every axis of the mesh is cut where a part that is taken begins or ends.
    shape, place = [], {}
    for name, size in sizes.items():
        ends = {end for axis, low, part in taken if axis == name for end in (low, low * part)}
        for low, high in itertools.pairwise(sorted({1, size} | ends)):
            place[name, low] = len(shape)
            shape.append(high // low)
    inside = [place[name, low] for name, low, part in taken if part > 1]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    devices = np.arange(math.prod(shape)) if order is None else _array(order)
    size = math.prod(shape[axis] for axis in inside)
    return devices.reshape(shape).transpose(outside + inside).reshape(-1, size)
