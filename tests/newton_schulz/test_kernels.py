"""`ns_implementation`: an iteration whose symmetric products a kernel computes, interpreted."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from muonclip_jax import orthogonalize, scale_by_muon
from muonclip_jax.kernels import symmetric_tpu
from muonclip_jax.newton_schulz import plan_polar
from muonclip_jax.newton_schulz._orthogonalize import apply_polar, apply_polar_by_columns
from tests.helpers import TOLERANCE, equations, lowered, polynomial_of_singular_values

ROWS = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]
ON_A_TPU: dict[str, Any] = {"ns_implementation": "mosaic_tpu", "platform": "tpu"}


@pytest.fixture
def on_a_tpu(monkeypatch):
    """What a TPU would do, by a kernel that runs here."""
    interpret = functools.partial(symmetric_tpu.symmetric_product, interpret=True)
    monkeypatch.setattr(symmetric_tpu, "symmetric_product", interpret)


def _matrices(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _launches(function, *args) -> int:
    calls = [e for e in equations(jax.make_jaxpr(function)(*args)) if "name" in e.params]
    return sum(each.params["name"] == "symmetric_product" for each in calls)


@pytest.mark.usefixtures("on_a_tpu")
@pytest.mark.parametrize(
    ("shape", "method", "preconditioning", "power", "launches"),
    [
        ((2, 10, 6), "standard", "frobenius", 2, 3),  # two X X^T and a square
        # The first X X^T is wanted in a wider dtype, which XLA computes, but here it is as wide.
        ((2, 6, 10), "gram", "schatten8", 8, 5),
    ],
)
def test_an_iteration_by_kernels_is_its_polynomial(shape, method, preconditioning, power, launches):
    x = _matrices(*shape)
    settings = {"ns_method": method, "ns_dtype": "float32", "preconditioning": preconditioning}
    run = functools.partial(orthogonalize, ns_coeffs=ROWS, **settings, **ON_A_TPU)
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    norm = np.linalg.norm(values, ord=power, axis=-1)[..., None, None]
    expected = polynomial_of_singular_values(x / norm, ROWS)
    np.testing.assert_allclose(jax.jit(run)(x), expected, atol=10 * TOLERANCE["float32"])
    assert _launches(run, x) == launches
    assert _launches(functools.partial(run, ns_implementation="xla"), x) == 0
    # The derivatives are those of XLA's products.
    weights = _matrices(2, *shape)[1]

    def loss(x, implementation):
        return jnp.vdot(weights, run(x, ns_implementation=implementation))

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(x, n) for n in ("mosaic_tpu", "xla")]
    np.testing.assert_allclose(*gradients, atol=1e-4)


@pytest.mark.usefixtures("on_a_tpu")
def test_devices_that_share_columns_use_kernels_too_and_those_that_explicit_axes_share_refuse():
    x, columns = _matrices(6, 12), PartitionSpec(None, "tp")
    mesh = jax.make_mesh((2,), ("tp",), (AxisType.Auto,), devices=jax.devices()[:2])
    polar = plan_polar(ROWS, ns_dtype="float32", **ON_A_TPU)
    run = functools.partial(apply_polar_by_columns, polar, axes=("tp",))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=columns, out_specs=columns, check_vma=False)
    expected = polynomial_of_singular_values(x / np.linalg.norm(x), ROWS)
    sharded = jax.device_put(x, NamedSharding(mesh, columns))
    np.testing.assert_allclose(jax.jit(mapped)(sharded), expected, atol=10 * TOLERANCE["float32"])
    assert _launches(mapped, sharded) == len(ROWS)

    mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        stack = jax.device_put(jnp.ones((2, 4, 6)), NamedSharding(mesh, PartitionSpec("d")))
        with pytest.raises(NotImplementedError, match=r"'mosaic_tpu' .*2@d.*jax.shard_map, or"):
            jax.eval_shape(functools.partial(orthogonalize, **ON_A_TPU), stack)


def test_an_optimizer_hands_it_on_and_a_named_kernel_computes_or_says_why_not():
    params = {"w": jnp.asarray(_matrices(6, 10))}
    tx = scale_by_muon(ROWS, **ON_A_TPU)
    assert _launches(tx.update, params, tx.init(params)) > 0
    x = jnp.asarray(_matrices(256, 384), jnp.float16)
    polar = plan_polar(ROWS, None, "standard", "float16", ns_implementation="mosaic_gpu")
    hopper = dataclasses.replace(polar, platform="gpu")
    # Two products X X^T and a square.
    text = lowered("cuda", functools.partial(apply_polar, hopper), x)
    assert text.count("symmetric_product") >= 3
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' runs on a GPU, .* for 'cpu'"):
        apply_polar(polar, x)
    with pytest.raises(NotImplementedError, match=r"multiplies bfloat16 and float16.*in float32"):
        apply_polar(dataclasses.replace(hopper, dtype="float32"), x)
