"""`apply_polar_partitioned`: columns on two devices, against float64 NumPy of the whole matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from muonclip_jax.newton_schulz import PRECONDITIONINGS, PolarPlan, plan_polar
from muonclip_jax.newton_schulz.partitioned import apply_polar_partitioned
from tests.helpers import TOLERANCE, polynomial_of_singular_values

ROW = (2.0, -1.5, 0.5)
POWER = {"frobenius": 2, "schatten": 4, "schatten8": 8, "spectral": np.inf}


def matrices(scale: float = 1.0) -> np.ndarray:
    """Three rows, which two devices do not divide."""
    return (np.random.default_rng(0).normal(size=(2, 3, 8)) * scale).astype(np.float32)


def run(plan: PolarPlan, x: np.ndarray, eps: float = 1e-7) -> jax.Array:
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    columns = PartitionSpec(None, None, "tp")
    polar = functools.partial(apply_polar_partitioned, plan, axes=("tp",), eps=eps)
    return jax.jit(jax.shard_map(polar, mesh=mesh, in_specs=columns, out_specs=columns))(x)


def expected(x: np.ndarray, preconditioning: str = "frobenius", eps: float = 0.0) -> np.ndarray:
    """One step from the definition, for `eps` added to the norm as it is."""
    x = x.astype(np.float64)
    if preconditioning == "aol":
        norm = np.sqrt(np.abs(x @ np.swapaxes(x, -1, -2)).sum(axis=-1, keepdims=True))
    else:
        values = np.linalg.svd(x, compute_uv=False)
        norm = np.linalg.norm(values, ord=POWER[preconditioning], axis=-1)[..., None, None]
    return polynomial_of_singular_values(x / (norm + eps), [ROW])


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_every_preconditioning_is_its_definition(preconditioning: str):
    x = matrices()
    y = run(plan_polar((ROW,), preconditioning=preconditioning), x)
    np.testing.assert_allclose(y, expected(x, preconditioning), atol=TOLERANCE["float32"])


def test_subnormal_matrices_are_orthogonalised_too():
    x = matrices(2.0**-140)
    assert np.abs(x).max() < np.finfo(np.float32).tiny
    np.testing.assert_allclose(run(plan_polar((ROW,)), x), expected(x), atol=TOLERANCE["float32"])


def test_an_eps_that_is_not_relative_is_added_to_the_norm():
    x = matrices(1e-7)
    plan = plan_polar((ROW,), relative_eps=False)
    np.testing.assert_allclose(run(plan, x, 1e-7), expected(x, eps=1e-7), atol=TOLERANCE["float32"])
    # The same eps that is relative guards the zero matrix alone.
    np.testing.assert_allclose(
        run(plan_polar((ROW,)), x, 1e-7), expected(x), atol=TOLERANCE["float32"]
    )


def test_zero_stays_zero():
    for relative in (True, False):
        y = run(plan_polar((ROW,), relative_eps=relative), np.zeros((2, 3, 8), np.float32))
        assert jnp.all(y == 0)
