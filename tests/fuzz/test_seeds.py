"""A handful of random configurations; `make fuzz` draws more.

Each is the smallest seed that has found a fault, or one of a way to call the update that no other
seed here has.
"""

import pytest

from tests.fuzz.draw import draw_case
from tests.fuzz.programs import standalone
from tests.fuzz.run import run

#: Seed -> what it has that the others have not.
SEEDS = {
    8: "init of shapes on Explicit axes",
    25: "64-bit mode",
    39: "a clip on Explicit axes without set_mesh",
    48: "a gradient through the update",
}


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed}: {SEEDS[seed]}")
def test_a_random_configuration(seed: int):
    outcome = run(draw_case(seed))
    if outcome.status == "failed":
        program = standalone(draw_case(seed), outcome.kind == "crash")
        pytest.fail(f"{outcome.kind}: {outcome.detail}\n\n{program}", pytrace=False)
