"""`ns_implementation=None`: symmetric products of an iteration by a kernel, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from muonclip_jax.kernels.platform import Target
from muonclip_jax.kernels.symmetric import dispatch, mosaic_tpu
from muonclip_jax.polar import orthogonalize, plan_polar
from muonclip_jax.polar.partitioned import apply_polar_partitioned
from muonclip_jax.transforms import scale_by_muon
from tests.helpers import TOLERANCE, equations, lowered, polynomial_of_singular_values

ROWS = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5)]


@pytest.fixture(autouse=True)
def _on_a_tpu(monkeypatch):
    """What a TPU would decide, by a kernel that runs here, at any size."""
    interpreted = dispatch.Implementation(
        functools.partial(mosaic_tpu.run, interpret=True), mosaic_tpu.refusal, "tpu"
    )
    monkeypatch.setitem(dispatch.KERNELS, "mosaic_tpu", interpreted)
    monkeypatch.setattr(dispatch, "current_target", lambda platform=None: Target("tpu"))
    monkeypatch.setattr(dispatch, "is_alone", lambda: True)
    monkeypatch.setattr(dispatch, "_WORTHWHILE", 0.0)


def _matrices(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _launches(function, *args) -> int:
    return sum(
        equation.params.get("name") == "symmetric_product"
        for equation in equations(jax.make_jaxpr(function)(*args))
        if equation.primitive.name == "pallas_call"
    )


@pytest.mark.parametrize("preconditioning", ["frobenius", "schatten8"])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(6, 10), (2, 10, 6)])
def test_an_iteration_by_kernels_is_its_polynomial(shape, method, preconditioning):
    x = _matrices(*shape)
    run = functools.partial(
        orthogonalize,
        ns_coeffs=ROWS,
        ns_method=method,
        preconditioning=preconditioning,
        ns_implementation=None,
    )
    power = {"frobenius": 2, "schatten8": 8}[preconditioning]
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    norm = np.linalg.norm(values, ord=power, axis=-1)[..., None, None]
    expected = polynomial_of_singular_values(x / norm, ROWS)
    np.testing.assert_allclose(run(jnp.asarray(x)), expected, atol=10 * TOLERANCE["float32"])
    # Three products X X^T or their like and two squares at least; none that has no symmetry.
    assert _launches(run, x) >= 5
    assert _launches(functools.partial(run, ns_implementation="xla"), x) == 0


def test_devices_that_share_columns_use_kernels_too():
    x = _matrices(6, 12)
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    columns = PartitionSpec(None, "tp")
    plan = plan_polar(ROWS, ns_implementation=None)
    polar = jax.shard_map(
        functools.partial(apply_polar_partitioned, plan, axes=("tp",)),
        mesh=mesh,
        in_specs=columns,
        out_specs=columns,
        check_vma=False,
    )
    expected = polynomial_of_singular_values(x / np.linalg.norm(x), ROWS)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, columns))
    np.testing.assert_allclose(jax.jit(polar)(sharded), expected, atol=10 * TOLERANCE["float32"])
    assert _launches(polar, sharded) == len(ROWS)


def test_an_optimizer_hands_it_on():
    params = {"w": jnp.asarray(_matrices(6, 10))}
    launches = {}
    for implementation in (None, "xla"):
        tx = scale_by_muon(ROWS, ns_implementation=implementation)
        launches[implementation] = _launches(tx.update, params, tx.init(params))
    assert launches["xla"] == 0 < launches[None]


def test_a_named_kernel_computes_or_says_why_not(monkeypatch):
    x = jnp.asarray(_matrices(256, 384), jnp.float16)
    run = functools.partial(orthogonalize, ns_coeffs=ROWS, ns_method="standard", ns_dtype="float16")
    named = functools.partial(run, ns_implementation="mosaic_gpu")
    text = lowered("cuda", named, x)
    # Three products X X^T and two squares; three updates a X + B X, fused as well.
    assert text.count("symmetric_product") >= 5
    assert text.count("matmul_add") >= 3
    with pytest.raises(NotImplementedError, match="256 x 128"):
        named(x[:8])
    with pytest.raises(ValueError, match=r"ns_implementation='cublas' is not known. Pass one of"):
        plan_polar(ns_implementation="cublas")
