"""The stability simulation, and that its restarts do in an array what they do in the simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.newton_schulz import COEFFICIENT_SETS, plan_polar
from muonclip_jax.newton_schulz.gram import gram_newton_schulz
from muonclip_jax.newton_schulz.preconditioning import normalize
from muonclip_jax.newton_schulz.restarts import amplifications, choose_restarts, is_gram_safe

FIVE = {
    name: COEFFICIENT_SETS[name].rows[:5] for name in ("keller_jordan", "you", "polar_express_1.05")
}


@pytest.mark.parametrize(
    ("name", "restart"), [("you", 2), ("polar_express_1.05", 2), ("keller_jordan", 3)]
)
def test_published_restarts(name: str, restart: int) -> None:
    assert choose_restarts(FIVE[name], "float16") == (restart,)


def test_without_a_restart_the_factor_is_lost() -> None:
    assert max(amplifications(FIVE["you"], (), 4e-4)) == pytest.approx(2e8, rel=0.1)


def test_a_row_that_nearly_reaches_zero_does_no_harm() -> None:
    # The first row of minimax4 comes within 3 % of zero inside (0, 1), which makes Q badly
    # conditioned wherever the restart is. What is lost there is small; what grows decides.
    assert choose_restarts(COEFFICIENT_SETS["minimax4"].rows, "float16") == (2,)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_restarts_lie_between_steps(name: str, dtype: str) -> None:
    rows = COEFFICIENT_SETS[name].rows
    places = choose_restarts(rows, dtype)
    assert list(places) == sorted(set(places))
    assert all(1 <= place < len(rows) for place in places)


def test_one_step_needs_none() -> None:
    assert choose_restarts(((2.0, -1.5, 0.5),), "float16") == ()


def test_bfloat16_is_never_safe() -> None:
    assert not any(is_gram_safe(s.rows, "bfloat16") for s in COEFFICIENT_SETS.values())


def test_a_long_iteration_is_not_safe_in_float16() -> None:
    # As many restarts as are tried leave segments of five steps.
    rows = FIVE["keller_jordan"] * 5
    assert not is_gram_safe(rows, "float16")
    assert is_gram_safe(rows, "float32")


def test_restart_saves_float16() -> None:
    # Log-spaced singular values: the spectrum on which rounding does the most harm.
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    v, _ = np.linalg.qr(rng.normal(size=(256, 64)))
    x = jnp.asarray((u * np.logspace(0, -3, 64)) @ v.T, jnp.float32)
    x = normalize(x, "frobenius", 1e-7)
    plan = plan_polar("polar_express_1.05", 5)
    with jax.disable_jit():  # each 16-bit rounding really takes place
        run = [
            gram_newton_schulz(x, plan.rows, "frobenius", jnp.dtype("float16"), restarts)
            for restarts in ((), choose_restarts(plan.rows, "float16"))
        ]
    without, with_restart = (np.asarray(y, np.float64) for y in run)
    worst = np.linalg.norm(with_restart, ord=2)
    assert worst < 1.2
    assert not np.linalg.norm(np.nan_to_num(without, nan=1e9), ord=2) < worst
