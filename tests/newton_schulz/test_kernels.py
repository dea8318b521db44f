"""`ns_implementation`: an iteration whose symmetric products a kernel computes, interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from muonclip_jax.kernels import symmetric_tpu
from muonclip_jax.newton_schulz import apply_polar, orthogonalize, plan_polar
from muonclip_jax.newton_schulz.partitioned import apply_polar_partitioned
from muonclip_jax.transforms import scale_by_muon
from tests.helpers import TOLERANCE, equations, lowered, polynomial_of_singular_values

ROWS = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5)]


@pytest.fixture
def on_a_tpu(monkeypatch):
    """What a TPU would do, by a kernel that runs here."""
    interpret = functools.partial(symmetric_tpu.symmetric_product, interpret=True)
    monkeypatch.setattr(symmetric_tpu, "symmetric_product", interpret)


def _matrices(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _launches(function, *args) -> int:
    return sum(
        equation.params.get("name") == "symmetric_product"
        for equation in equations(jax.make_jaxpr(function)(*args))
        if equation.primitive.name == "pallas_call"
    )


@pytest.mark.usefixtures("on_a_tpu")
@pytest.mark.parametrize(
    ("shape", "method", "preconditioning"),
    [
        ((6, 10), "standard", "schatten8"),
        ((2, 10, 6), "standard", "frobenius"),
        ((2, 6, 10), "gram", "schatten8"),
    ],
)
def test_an_iteration_by_kernels_is_its_polynomial(shape, method, preconditioning):
    x = _matrices(*shape)
    run = functools.partial(
        orthogonalize,
        ns_coeffs=ROWS,
        ns_method=method,
        ns_dtype="float32",
        preconditioning=preconditioning,
        ns_implementation="mosaic_tpu",
        platform="tpu",
    )
    power = {"frobenius": 2, "schatten8": 8}[preconditioning]
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    norm = np.linalg.norm(values, ord=power, axis=-1)[..., None, None]
    expected = polynomial_of_singular_values(x / norm, ROWS)
    np.testing.assert_allclose(jax.jit(run)(x), expected, atol=10 * TOLERANCE["float32"])
    # Three products X X^T or their like and two squares at least.
    assert _launches(run, x) >= 5
    assert _launches(functools.partial(run, ns_implementation="xla"), x) == 0


@pytest.mark.usefixtures("on_a_tpu")
def test_devices_that_share_columns_use_kernels_too():
    x = _matrices(6, 12)
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    columns = PartitionSpec(None, "tp")
    polar = plan_polar(ROWS, ns_dtype="float32", ns_implementation="mosaic_tpu", platform="tpu")
    mapped = jax.shard_map(
        functools.partial(apply_polar_partitioned, polar, axes=("tp",)),
        mesh=mesh,
        in_specs=columns,
        out_specs=columns,
        check_vma=False,
    )
    expected = polynomial_of_singular_values(x / np.linalg.norm(x), ROWS)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, columns))
    np.testing.assert_allclose(jax.jit(mapped)(sharded), expected, atol=10 * TOLERANCE["float32"])
    assert _launches(mapped, sharded) == len(ROWS)


@pytest.mark.usefixtures("on_a_tpu")
def test_stacks_that_explicit_axes_shard_are_refused():
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 4, 6)), jax.NamedSharding(mesh, PartitionSpec("d")))
        with pytest.raises(NotImplementedError, match=r"'mosaic_tpu' .*2@d.*jax.shard_map, or"):
            jax.eval_shape(
                functools.partial(orthogonalize, ns_implementation="mosaic_tpu", platform="tpu"), x
            )


@pytest.mark.usefixtures("on_a_tpu")
def test_derivatives_are_those_of_xla():
    x = jnp.asarray(_matrices(4, 6))

    def loss(implementation, x):
        y = orthogonalize(
            x, ns_coeffs=ROWS, ns_dtype="float32", ns_implementation=implementation, platform="tpu"
        )
        return jnp.vdot(_matrices(2, 4, 6)[1], y)

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, each)))(x) for each in ("mosaic_tpu", "xla")
    )
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.usefixtures("on_a_tpu")
def test_an_optimizer_hands_it_on():
    params = {"w": jnp.asarray(_matrices(6, 10))}
    tx = scale_by_muon(ROWS, ns_implementation="mosaic_tpu", platform="tpu")
    assert _launches(tx.update, params, tx.init(params)) > 0


def test_a_named_kernel_computes_or_says_why_not():
    x = jnp.asarray(_matrices(256, 384), jnp.float16)
    polar = plan_polar(
        ROWS, ns_method="standard", ns_dtype="float16", ns_implementation="mosaic_gpu"
    )
    hopper = dataclasses.replace(polar, platform="gpu")
    # Three products X X^T and two squares.
    assert (
        lowered("cuda", functools.partial(apply_polar, hopper), x).count("symmetric_product") >= 5
    )
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' runs on a GPU, .* for 'cpu'"):
        apply_polar(polar, x)
    wide = dataclasses.replace(hopper, dtype="float32")
    with pytest.raises(NotImplementedError, match=r"multiplies bfloat16 and float16.*in float32"):
        apply_polar(wide, x)
