"""A handful of random configurations, each of another way to call the update; see `make fuzz`.

What a seed means changes with the order of the draws; a case that must stay belongs into a test of
its own.
"""

import pytest

from tests.fuzz.check import run
from tests.fuzz.draw import draw_case

#: Seed -> what it has that the others have not.
SEEDS = {
    336: "64-bit mode, float64, split matrices",
    1: "64-bit mode, clip",
    9: "eager on a mesh",
    2: "shard_map over all axes",
    401: "shard_map over some axes",
    111: "shard_map beside an Explicit axis and a sharding of size one",
    22: "an Explicit mesh of size one, attention",
    216: "a clip on Explicit axes without set_mesh",
    10: "adaptive with ZeRO-1 on Explicit axes",
    16: "ZeRO-1 on Auto axes",
    143: "columns of a matrix on all devices, several steps",
    735: "axes of both types, matrices split over devices",
}


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed}: {SEEDS[seed]}")
def test_a_random_configuration(seed: int):
    case = draw_case(seed)
    wrong = run(case)
    assert not wrong, f"{wrong}\n\n{case}"
