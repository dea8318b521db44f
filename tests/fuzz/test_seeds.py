"""A handful of random configurations; `make fuzz` draws more.

Each has found a fault, or is of a way to call the update that no other seed here has. What a seed
means changes with the order of the draws; a case that must stay belongs into a test of its own.
"""

import pytest

from tests.fuzz.draw import draw_case
from tests.fuzz.programs import standalone
from tests.fuzz.run import run

#: Seed -> what it has that the others have not.
SEEDS = {
    3: "64-bit mode, float64",
    29: "64-bit mode, clip",
    10: "a gradient, split matrices",
    48: "a gradient, ZeRO-1",
    16: "pmap",
    49: "eager",
    54: "shard_map over all axes",
    17: "shard_map over some axes",
    117: "shard_map beside an Explicit axis of size one",
    1097: "shard_map beside a sharding of size one",
    92: "an Explicit mesh of size one",
    94: "an Explicit mesh of size one, attention",
    146: "a clip on Explicit axes without set_mesh",
    169: "init of shapes on Explicit axes",
    424: "adaptive with ZeRO-1 on Explicit axes",
}


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed}: {SEEDS[seed]}")
def test_a_random_configuration(seed: int):
    outcome = run(draw_case(seed))
    if outcome.status == "failed":
        program = standalone(draw_case(seed), outcome.kind == "crash")
        pytest.fail(f"{outcome.kind}: {outcome.detail}\n\n{program}", pytrace=False)
