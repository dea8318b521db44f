"""`orthogonalize` against the scalar polynomial and the SVD."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from muonclip_jax.newton_schulz import apply_polar, iteration, orthogonalize
from muonclip_jax.newton_schulz._orthogonalize import apply_polar_by_columns
from muonclip_jax.newton_schulz.coefficients import (
    COEFFICIENT_SETS,
    GROWTH,
    evaluate,
    guard_rows,
    resolve_coefficients,
)
from muonclip_jax.newton_schulz.plan import PRECONDITIONINGS, PolarPlan, plan_polar
from tests.helpers import TOLERANCE, polynomial_of_singular_values

KJ = (3.4445, -4.7750, 2.0315)
METHODS = ("standard", "gram")
# Products commute with rounding in no set: an error of one step grows by the slope at zero, up to
# 8e4 (deepseek_v4), times 1e-16.
near64 = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)
near32 = functools.partial(np.testing.assert_allclose, atol=TOLERANCE["float32"])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def jitted(x: Any, **options: Any) -> jax.Array:
    """One program: where a shape is met once, its operations alone would be one each."""
    return jax.jit(functools.partial(orthogonalize, **options))(jnp.asarray(x))


def matrix(*shape: int, dtype: str = "float64") -> np.ndarray:
    real, imaginary = np.random.default_rng(0).normal(size=(2, *shape))
    return (real + 1j * imaginary if dtype.startswith("complex") else real).astype(dtype)


def exact(x: np.ndarray, ns_coeffs, preconditioning=None, eps: float = 0.0) -> np.ndarray:
    """Rescales by the preconditioning's definition, and applies the polynomial, in float64."""
    if x.shape[-2] > x.shape[-1]:
        return exact(x.mT, ns_coeffs, preconditioning, eps).mT
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    rows, source = resolve_coefficients(ns_coeffs)
    preconditioning = preconditioning or source.preconditioning
    if preconditioning == "aol":
        norm = np.sqrt(np.abs(x @ x.conj().mT).sum(axis=-1))[..., None]
    else:
        power = {"frobenius": 2, "schatten": 4, "schatten8": 8, "spectral": np.inf}
        values = np.linalg.svd(x, compute_uv=False)
        norm = np.linalg.norm(values, ord=power[preconditioning], axis=-1)[..., None, None]
    return polynomial_of_singular_values(x / (norm + eps), list(rows))


@pytest.mark.parametrize(
    ("shape", "dtype", "method", "preconditioning"),
    [
        ((5, 12), "float64", "standard", "frobenius"),
        ((12, 5), "complex128", "gram", "frobenius"),
        ((7, 7), "complex128", "standard", "spectral"),
        ((2, 6, 10), "float64", "gram", "spectral"),
        ((2, 10, 6), "float64", "standard", "aol"),
        ((6, 10), "complex128", "gram", "aol"),
        ((2, 2, 9, 4), "float64", "gram", "schatten"),
        ((6, 10), "complex128", "standard", "schatten"),
        ((10, 6), "complex128", "gram", "schatten8"),
        ((2, 6, 10), "float64", "standard", "schatten8"),
        ((1, 6), "complex128", "standard", "frobenius"),
        ((6, 1), "float64", "gram", "schatten8"),
        ((1, 1), "float64", "gram", "frobenius"),
    ],
)
@pytest.mark.usefixtures("float64")
def test_is_the_polynomial_of_the_singular_values(shape, dtype, method, preconditioning) -> None:
    x = matrix(*shape, dtype=dtype)
    y = jitted(x, ns_coeffs=KJ, ns_method=method, preconditioning=preconditioning)
    assert y.dtype == dtype
    near64(y, exact(x, KJ, preconditioning))


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_every_set(name: str) -> None:
    rows, x = COEFFICIENT_SETS[name].rows, matrix(2, 6, 10)
    with jax.enable_x64(True):
        for method in METHODS:
            near64(jitted(x, ns_coeffs=name, ns_method=method), exact(x, name))
    # In float32 rounding, or the guard of steep sets, comes out multiplied by the steepest slope.
    x = x.astype(np.float32)
    slope = np.abs(np.diff(evaluate(rows, np.linspace(0, 1, 1_000_001)))).max() * 1e6
    relative = 2.0**-24 if guard_rows(rows, "float32") == rows else GROWTH["float32"]
    near32(jitted(x, ns_coeffs=name), exact(x, name), atol=max(1e-5, slope * relative))
    # One entry is its sign, and what is not finite stays visible in its matrix.
    y = jitted(np.asarray([[[-3]], [[2e-5]], [[0]], [[np.inf]]], np.float32), ns_coeffs=name)
    f = exact(np.ones((1, 1)), name).item()
    near32(y.ravel(), [-f, f, 0, np.nan], atol=max(1e-5, 2 * slope * relative))
    # Rank one keeps its direction; AOL rescales the rows, so there it is another.
    x = np.outer(np.arange(1.0, 5.0), np.linspace(-1, 1, 7)).astype(np.float32)
    y = np.asarray(jitted(x, ns_coeffs=name))
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert cosine > (0.8 if name == "turbo" else 0.99)


def test_svd_is_the_polar_factor() -> None:
    for *shape, dtype in ((3, 5, 9, "float32"), (9, 5, "complex64"), (6, 6, "float32")):
        x = matrix(*shape, dtype=dtype)
        u, _, vh = np.linalg.svd(x.astype(np.complex128), full_matrices=False)
        y = jitted(x, ns_method="svd")
        assert y.dtype == x.dtype
        near32(y, u @ vh)
    outer = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 7.0)).astype("complex64")
    near32(jitted(outer, ns_method="svd"), outer / np.linalg.norm(outer))  # adds no direction


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("turbo", "gram", "bfloat16"),
        ("minimax4", "standard", "float32"),
        ("you", "standard", "float16"),
        ("keller_jordan", "svd", "float64"),
        ("keller_jordan", "gram", "complex64"),
    ],
)
def test_scale_does_not_matter_and_a_power_of_two_changes_no_bit(name, method, dtype) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(matrix(6, 10, dtype=dtype if dtype != "bfloat16" else "float32"), dtype)
        apply = jax.jit(functools.partial(apply_polar, plan_polar(name, ns_method=method)))
        expected, info = np.asarray(apply(x)), jnp.finfo(dtype)
        # From where a smaller entry would lose digits to where the largest one would overflow.
        lowest, highest = info.minexp + max(info.nmant, 14), info.maxexp - 4
        for power in (lowest, lowest // 2, -1, 1, highest // 2, highest):
            scaled = apply(x * jnp.asarray(2.0**power, x.real.dtype))
            np.testing.assert_array_equal(np.asarray(scaled), expected)
        # Another scale rounds the input, which the steps amplify.
        scale, atol = (1e-3, 5e-2) if "16" in dtype else (1e-9, 1e-4)
        y = np.asarray(apply(x * jnp.asarray(scale, x.real.dtype))).astype(np.complex128)
        near32(y, expected.astype(np.complex128), atol=atol)


@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_extreme_entries(method: str) -> None:
    x, run = matrix(4, 6, dtype="float32"), functools.partial(jitted, ns_coeffs="you")
    expected = run(x, ns_method=method)
    # The last scale makes all entries subnormal: 1e-45 / scale is lost by the input's rounding.
    for scale in (3e38 / np.abs(x).max(), 1e-36, 1e-38, 1e-40):
        y = run((x * scale).astype(np.float32), ns_method=method)
        near32(y, expected, atol=1e-4 + 500e-45 / scale)
    # Their multiples of the smallest number, 2^-149, are the matrix.
    multiples = np.random.default_rng(0).integers(-1000, 1000, (4, 6)).astype(np.float32)
    subnormal = (multiples.astype(np.float64) * 2.0**-149).astype(np.float32)
    expected = run(multiples, ns_method=method)
    np.testing.assert_array_equal(run(subnormal, ns_method=method), expected)


@pytest.mark.parametrize(
    ("dtype", "preconditioning", "method"),
    [
        ("float32", "frobenius", "svd"),
        ("complex64", "frobenius", "gram"),
        ("float16", "spectral", "standard"),
        ("float32", "aol", "standard"),
        ("bfloat16", "aol", "gram"),
        ("float32", "schatten", "gram"),
        ("bfloat16", "schatten8", "standard"),
        ("float32", "schatten8", "gram"),
    ],
)
def test_zero_gives_zero_and_nothing_gives_nothing(dtype, preconditioning, method) -> None:
    eye = np.eye(6, 10)
    x = jnp.asarray(np.stack([eye, 0 * eye, eye * (np.arange(6) != 1)[:, None]]), dtype)
    y = jitted(x, preconditioning=preconditioning, ns_method=method)
    assert y.dtype == x.dtype
    found = np.asarray(y, np.complex64)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[2, 1], 0)
    assert (np.abs(np.diag(found[0])) > 0.5).all()
    for shape in ((0, 4, 6), (3, 0, 5), (3, 5, 0), (0, 0)):
        empty = orthogonalize(jnp.zeros(shape, dtype), ns_method=method)
        assert (empty.shape, empty.dtype) == (shape, x.dtype)


@pytest.mark.usefixtures("float64")
def test_batches_vmap_shapes_and_eps() -> None:
    x = jnp.asarray(matrix(1, 2, 6, 10))
    for method in (*METHODS, "svd"):
        apply = functools.partial(apply_polar, plan_polar(ns_method=method))
        one = jax.jit(apply)
        # Programs of other shapes round differently, and the default rows are steep.
        expected = np.stack([[one(x[0, 0]), one(x[0, 1])]])
        for y in (one(x), jax.vmap(jax.vmap(apply))(x), one(x, 1e-6)):
            near64(y, expected)
        shaped = jax.eval_shape(apply, jax.ShapeDtypeStruct((5, 9, 4), jnp.bfloat16))
        assert (shaped.shape, shaped.dtype) == ((5, 9, 4), jnp.bfloat16)


def test_products_are_in_float32_or_accumulate_there_and_a_batch_of_one_is_no_batch() -> None:
    def found(*shape: int, **settings: Any) -> list[str]:
        apply = functools.partial(apply_polar, plan_polar(**settings))
        text = jax.jit(apply).lower(jnp.zeros(shape)).as_text()
        return [line for line in text.splitlines() if "stablehlo.dot_general" in line]

    for method, dtype in (("standard", "bfloat16"), ("gram", "float16")):
        assert all("[HIGHEST, HIGHEST]" in dot for dot in found(4, 12, ns_method=method))
        narrow = found(4, 12, ns_method=method, ns_dtype=dtype)
        assert narrow
        assert all(dot.rstrip().endswith("xf32>") for dot in narrow)
    assert not any("batching" in dot for dot in found(1, 1, 12, 20))
    assert all("batching" in dot for dot in found(1, 3, 12, 20))


def test_sharded_operands() -> None:
    for spec, kind in (
        (P("a", "b"), AxisType.Explicit),
        (P(None, "b"), AxisType.Auto),
        (P("a", None, "b"), AxisType.Explicit),
        (P("a", "b", "c"), AxisType.Explicit),
    ):
        mesh = jax.make_mesh((1, 2, 2), ("a", "b", "c"), (kind,) * 3, devices=jax.devices()[:4])
        x = jnp.asarray(matrix(1, 2, 4, 4 if len(spec) < 3 else 8, dtype="float32"))
        for method in ("standard", "svd"):
            apply = jax.jit(functools.partial(apply_polar, plan_polar(ns_method=method)))
            sharded = jax.device_put(x, NamedSharding(mesh, P(*spec, None)))
            y = apply(sharded)
            near32(y, apply(x))
            assert kind == AxisType.Auto or jax.typeof(y) == jax.typeof(sharded)


def by_columns(plan: PolarPlan, x: np.ndarray, eps: float = 1e-7) -> jax.Array:
    mesh = jax.make_mesh((2,), ("tp",), (AxisType.Auto,), devices=jax.devices()[:2])
    polar = functools.partial(apply_polar_by_columns, plan, axes=("tp",), eps=eps)
    columns = P(None, None, "tp")
    return jax.jit(jax.shard_map(polar, mesh=mesh, in_specs=columns, out_specs=columns))(x)


def test_two_devices_that_share_columns() -> None:
    rows = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    x = matrix(2, 3, 8, dtype="float32")  # two devices do not divide three rows
    for how in PRECONDITIONINGS:
        near32(by_columns(plan_polar(rows, preconditioning=how), x), exact(x, rows, how))
    relative, absolute = (plan_polar(rows[:1], relative_eps=each) for each in (True, False))
    tiny, small = x * np.float32(2.0**-140), x * np.float32(1e-7)
    near32(by_columns(relative, tiny), exact(tiny, rows[:1]))
    # An eps that is not relative is added to the norm as it is; the other guards zero alone.
    near32(by_columns(absolute, small), exact(small, rows[:1], eps=1e-7))
    near32(by_columns(relative, small), exact(small, rows[:1]))
    for plan in (relative, absolute):
        assert jnp.all(by_columns(plan, 0 * x) == 0)
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    near32(by_columns(plan_polar(ns_method="svd"), x), u @ vh)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("float64")
def test_split_products_are_the_same_products(method: str, monkeypatch) -> None:
    # Large matrices on a CPU compute one triangle of 2 x 2 blocks; here small ones do too.
    monkeypatch.setattr(iteration, "SPLIT_FROM", 2)
    for shape, dtype in (((2, 6, 12), "complex128"), ((2, 7, 12), "float64")):
        x = matrix(*shape, dtype=dtype)
        near64(jitted(x, ns_coeffs="minimax4", ns_method=method), exact(x, "minimax4"))


def test_wrong_arguments() -> None:
    cases: Any = (
        ({"ns_dtype": "half precision"}, "ns_dtype='half precision' is not known"),
        ({"preconditioning": "l2"}, "preconditioning='l2' is not known. Pass one of 'frobenius'"),
        (
            {"ns_coeffs": "turbo", "preconditioning": "frobenius"},
            "needs preconditioning='aol', got",
        ),
        # Published for "aol" by another library: 4.0098 - 7.0585 + 2.4635 < 0 at one.
        ({"ns_coeffs": (4.0098, -7.0585, 2.4635), "ns_steps": 1}, "singular value .* negative"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            orthogonalize(jnp.ones((2, 3)), **arguments)

    # The annotations refuse these first in tests; users run without them.
    undecorated = getattr(apply_polar, "__wrapped__", apply_polar)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., m, n\), got shape \(3,\)"):
        undecorated(plan_polar(), jnp.ones(3))
    with pytest.raises(TypeError, match=r"got dtype int32\. Convert it first"):
        undecorated(plan_polar(), jnp.ones((2, 3), jnp.int32))
