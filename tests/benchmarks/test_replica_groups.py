"""The groups of devices of a collective: as they are written, and as they were asked for."""

import pytest

from benchmarks.replica_groups import read_groups

ALL = tuple(range(8))
EVEN_AND_ODD = [(0, 2, 4, 6), (1, 3, 5, 7)]
HALVES = [(0, 1, 2, 3), (4, 5, 6, 7)]
ACROSS_PAIRS = [(0, 2), (1, 3), (4, 6), (5, 7)]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", EVEN_AND_ODD),
        ("{}", [ALL]),
        ("[2,4]<=[8]", HALVES),
        ("[4,2]<=[2,2,2]T(0,2,1)", ACROSS_PAIRS),
        ("mesh[x=4,y=2] {y}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("mesh['x'=4,'y'=2] {'y','x'}", [(0, 2, 4, 6, 1, 3, 5, 7)]),
        # One program, by JAX 0.12 and by 0.10.
        ("mesh['x'=4,'y'=2] {'x':(2)2}", ACROSS_PAIRS),
        (
            "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(0,2,1)) {'axis_1':(2)2}",
            ACROSS_PAIRS,
        ),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", HALVES),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", [(3, 0), (1, 2)]),
        # The middle digit of a coordinate of 12 = 2 x 3 x 2.
        ("mesh['x'=12] {'x':(2)3}", [(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)]),
    ],
)
def test_what_is_written(written: str, expected: list[tuple[int, ...]]):
    attributes = f", channel_id=1, replica_groups={written}, dimensions={{0}}"
    assert read_groups(attributes, sum(map(len, expected))) == expected


def test_pairs_all_devices_and_an_unknown_way():
    assert read_groups(", source_target_pairs={{0,1},{1,0}}", 2) == [(0, 1), (1, 0)]
    assert read_groups(", source_target_pairs={}", 2) == []
    assert read_groups(", dimensions={0}", 3) == [(0, 1, 2)]
    with pytest.raises(ValueError, match="written in an unknown way"):
        read_groups(", replica_groups=ring(0,1)", 2)
