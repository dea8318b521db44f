"""`orthogonalize` against the scalar polynomial, the SVD, golden float64 values and Optax."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib._muon import orthogonalize_via_newton_schulz

from muonclip_jax.newton_schulz import (
    COEFFICIENT_SETS,
    PRECONDITIONINGS,
    PolarPlan,
    apply_polar,
    orthogonalize,
    plan_polar,
    products,
)
from muonclip_jax.newton_schulz.coefficients import resolve_coefficients
from muonclip_jax.newton_schulz.generators import evaluate
from muonclip_jax.newton_schulz.precision import GROWTH, guarded_rows
from tests.helpers import TOLERANCE, polynomial_of_singular_values

KJ = (3.4445, -4.7750, 2.0315)
SHAPES = {
    "wide": (5, 12),
    "tall": (12, 5),
    "square": (7, 7),
    "batched": (2, 6, 10),
    "batched twice": (2, 2, 9, 4),
    "one row": (1, 6),
    "one column": (6, 1),
    "one entry": (1, 1),
}
METHODS = ("standard", "gram")
GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden" / "newton_schulz_float64.json").read_text()
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def jitted(x: jax.Array, **options: Any) -> jax.Array:
    """One program: where a shape is met once, its operations alone would be one each."""
    return jax.jit(functools.partial(orthogonalize, **options))(x)


def matrix(shape, dtype="float64", seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if np.issubdtype(np.dtype(dtype), np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return x.astype(dtype)


def rescaled(x: np.ndarray, preconditioning: str) -> np.ndarray:
    """What the preconditioning does, from its definition, in float64."""
    if preconditioning == "aol":
        if x.shape[-2] > x.shape[-1]:
            return np.swapaxes(rescaled(np.swapaxes(x, -1, -2), "aol"), -1, -2)
        product = x @ np.conj(np.swapaxes(x, -1, -2))
        return x / np.sqrt(np.abs(product).sum(axis=-1))[..., None]
    values = np.linalg.svd(x, compute_uv=False)
    power = {"frobenius": 2, "schatten": 4, "schatten8": 8, "spectral": np.inf}[preconditioning]
    norm = np.linalg.norm(values, ord=power, axis=-1)
    return x / norm[..., None, None]


def exact(x: np.ndarray, ns_coeffs, ns_steps=None, preconditioning=None) -> np.ndarray:
    rows, source = resolve_coefficients(ns_coeffs, ns_steps)
    x = rescaled(x, preconditioning or source.preconditioning)
    return polynomial_of_singular_values(x, list(rows))


# Products commute with rounding in no set: an error of one step grows by the slope at zero, up to
# 8e4 (deepseek_v4), times 1e-16.
FLOAT64 = 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    list(zip(SHAPES.values(), 4 * ["float64", "complex128"], strict=True)),
    ids=SHAPES,
)
@pytest.mark.usefixtures("float64")
def test_is_the_polynomial_of_the_singular_values(shape, dtype: str, method: str) -> None:
    x = matrix(shape, dtype)
    y = jitted(jnp.asarray(x), ns_coeffs="keller_jordan", ns_method=method)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, exact(x, "keller_jordan"), atol=FLOAT64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
@pytest.mark.usefixtures("float64")
def test_every_set_in_float64(name: str, method: str) -> None:
    x = matrix((2, 6, 10))
    y = orthogonalize(jnp.asarray(x), ns_coeffs=name, ns_method=method)
    np.testing.assert_allclose(y, exact(x, name), atol=FLOAT64)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_every_set_in_float32(name: str) -> None:
    x = matrix((2, 6, 10), "float32")
    y = orthogonalize(jnp.asarray(x), ns_coeffs=name)
    # Rounding, or the guard of steep sets, comes out multiplied by the steepest slope.
    rows = COEFFICIENT_SETS[name].rows
    slope = np.abs(np.diff(evaluate(rows, np.linspace(0, 1, 1_000_001)))).max() * 1e6
    relative = 2.0**-24 if guarded_rows(rows, "float32") == rows else GROWTH["float32"]
    atol = max(TOLERANCE["float32"], slope * relative)
    np.testing.assert_allclose(y, exact(x, name), atol=atol)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.usefixtures("float64")
def test_preconditioning_is_its_definition(preconditioning, method, dtype) -> None:
    x = matrix((2, 6, 10), dtype)
    for z in (x, np.swapaxes(x, -1, -2)):
        y = orthogonalize(
            jnp.asarray(z), ns_coeffs=KJ, preconditioning=preconditioning, ns_method=method
        )
        expected = exact(z, "keller_jordan", preconditioning=preconditioning)
        np.testing.assert_allclose(y, expected, atol=FLOAT64)


GOLDEN_SETS = {
    "simple(KJ)x5": ("keller_jordan", None),
    "KJx10": ("keller_jordan", 10),
    "quintic(You)": ("quintic", None),
    "PE GNS(/1.05) 5": ("polar_express_1.05", 5),
    "CANS 5": ("cans", None),
    "deepseekv4 10": ("deepseek_v4", None),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GOLDEN["sets"])
@pytest.mark.usefixtures("float64")
def test_golden_float64(name: str, method: str) -> None:
    x = np.sin(0.7 * np.arange(96)) + 0.5 * np.cos(0.13 * np.arange(96) ** 2)
    x = x.reshape(8, 12)
    golden = GOLDEN["sets"][name]
    out, rows = np.asarray(golden["out"]).reshape(8, 12), golden["coeffs"]
    if "1.02 norm" in name:  # that run divides by 1.02 times the norm
        (a, b, c), s = rows[0], 1.02
        rows = [(a / s, b / s**3, c / s**5), *rows[1:]]
    plan = PolarPlan(tuple(map(tuple, rows)), method, None, "frobenius")
    y = apply_polar(plan, jnp.asarray(x))
    np.testing.assert_allclose(y, out, atol=1e-9)
    if name in GOLDEN_SETS:
        coeffs, steps = GOLDEN_SETS[name]
        y = orthogonalize(jnp.asarray(x), ns_coeffs=coeffs, ns_steps=steps, ns_method=method)
        np.testing.assert_allclose(y, out, atol=1e-9)


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_optax_parity(preconditioning, dtype: str, shape) -> None:
    if preconditioning == "schatten" and dtype == "complex64":
        pytest.skip("optax forms x x^T without the conjugate there")
    x = jnp.asarray(matrix(shape, dtype))
    theirs = orthogonalize_via_newton_schulz(x, jnp.asarray(KJ), 5, preconditioning)
    ours = orthogonalize(x, ns_coeffs="keller_jordan", preconditioning=preconditioning)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("shape", [(3, 5, 9), (9, 5), (6, 6)])
def test_svd_is_the_polar_factor(shape, dtype: str) -> None:
    x = matrix(shape, dtype)
    u, _, vh = np.linalg.svd(x.astype(np.complex128), full_matrices=False)
    y = jitted(jnp.asarray(x), ns_method="svd")
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, u @ vh, atol=TOLERANCE["float32"])


def test_svd_of_low_rank_adds_no_direction() -> None:
    x = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 7.0)).astype(np.float32)
    y = orthogonalize(jnp.asarray(x), ns_method="svd")
    np.testing.assert_allclose(y, x / np.linalg.norm(x), atol=TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["keller_jordan", "turbo", "minimax4"])
@pytest.mark.parametrize("method", [*METHODS, "svd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_does_not_matter(name: str, method: str, dtype: str) -> None:
    x = jnp.asarray(matrix((6, 10), "float32"))
    apply = jax.jit(functools.partial(apply_polar, plan_polar(name, ns_method=method)))
    expected = np.asarray(apply(x.astype(dtype)), np.float32)
    for power in (-18, -12, -9, -3, 3, 12, 18):
        scaled = (x * 10.0**power).astype(dtype)
        y = np.asarray(apply(scaled), np.float32)
        # The scaled input differs by a rounding of its dtype, which the steps amplify.
        np.testing.assert_allclose(y, expected, atol=1e-4 if dtype == "float32" else 5e-2)
        # A power of two rounds nothing, and changes not one bit.
        exponent = float(2.0 ** round(power / 0.301))
        np.testing.assert_array_equal(
            np.asarray(apply(x.astype(dtype) * exponent), np.float32), expected
        )


@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_extreme_entries(method: str) -> None:
    apply = jax.jit(functools.partial(apply_polar, plan_polar("you", ns_method=method)))
    x = matrix((4, 6), "float32")
    expected = apply(jnp.asarray(x))
    np.testing.assert_allclose(apply(jnp.asarray(x * 1e37)), expected, atol=1e-4)
    largest = (x * (3e38 / np.abs(x).max())).astype(np.float32)
    np.testing.assert_allclose(apply(jnp.asarray(largest)), expected, atol=1e-4)
    # Some entries subnormal, then all of them; there 1e-45 / scale is lost by the input's rounding.
    for scale in (1e-36, 1e-37, 1e-38, 1e-39, 1e-40):
        y = apply(jnp.asarray((x * scale).astype(np.float32)))
        np.testing.assert_allclose(y, expected, atol=1e-4 + 500e-45 / scale)


def test_subnormal_bfloat16_and_complex_entries() -> None:
    x = matrix((4, 6), "complex64")
    expected = jitted(jnp.asarray(x))
    y = jitted(jnp.asarray((x.astype(np.complex128) * 1e-39).astype(np.complex64)))
    np.testing.assert_allclose(y, expected, atol=1e-3)
    power = jnp.asarray(np.ldexp(1.0, [[-120, -126, -130]]), jnp.bfloat16)
    y = np.asarray(orthogonalize(power, ns_coeffs="you"), np.float32)
    np.testing.assert_allclose(y[0] / y[0, 0], [1, 2.0**-6, 2.0**-10], rtol=1e-2)


def test_float16_input_at_the_ends_of_its_range() -> None:
    x = matrix((4, 6), "float32")
    expected = jitted(jnp.asarray(x))
    for scale in (1e-4, 2e4):  # subnormal entries; squares past 65504
        y = jitted(jnp.asarray(x * scale, jnp.float16))
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "preconditioning"),
    [("float32", name) for name in PRECONDITIONINGS]
    + [(dtype, "frobenius") for dtype in ("bfloat16", "float16", "complex64")],
)
@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_zero_gives_zero(dtype: str, preconditioning: str, method: str) -> None:
    x = jnp.asarray(np.stack([np.eye(6, 10), np.zeros((6, 10))]), dtype)
    y = jitted(x, preconditioning=preconditioning, ns_method=method)
    np.testing.assert_array_equal(
        jitted(0 * x, preconditioning=preconditioning, ns_method=method), 0
    )
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y[1]), 0)
    assert (np.abs(np.diag(np.asarray(y[0], np.complex64))) > 0.5).all()


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_zero_rows_stay_zero(preconditioning: str, method: str) -> None:
    x = matrix((2, 6, 10), "float32")
    x[:, 1] = 0
    y = np.asarray(orthogonalize(jnp.asarray(x), preconditioning=preconditioning, ns_method=method))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:, 1], 0, atol=1e-6)


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("float64")
def test_split_products_are_the_same_products(rows: int, method: str, monkeypatch) -> None:
    # Large matrices on a CPU compute one triangle of 2 x 2 blocks; here small ones do too.
    monkeypatch.setattr(products, "SPLIT_FROM", 2)
    for dtype in ("float64", "complex128"):
        x = matrix((2, rows, 12), dtype)
        y = jitted(jnp.asarray(x), ns_coeffs="minimax4", ns_method=method)
        np.testing.assert_allclose(y, exact(x, "minimax4"), atol=FLOAT64)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_rank_one_keeps_its_direction(name: str) -> None:
    x = np.outer(np.arange(1.0, 5.0), np.linspace(-1, 1, 7)).astype(np.float32)
    y = np.asarray(orthogonalize(jnp.asarray(x), ns_coeffs=name))
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    # AOL rescales the rows, so there the direction is another.
    assert cosine > (0.8 if name == "turbo" else 0.99)


def test_aol_rows_on_a_frobenius_norm_would_point_backwards() -> None:
    # Published AOL coefficients of another library: 4.0098 - 7.0585 + 2.4635 < 0 at one.
    rows = GOLDEN["sets"]["aol EO 4 (Frobenius norm)"]["coeffs"]
    x = np.outer(np.arange(1.0, 5.0), np.linspace(-1, 1, 7))
    y = polynomial_of_singular_values(x, rows, float(np.linalg.norm(x)))
    assert (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y) < -0.99
    with pytest.raises(ValueError, match=r"turn the singular value .* negative"):
        plan_polar(rows)


def test_one_entry_is_its_sign_on_the_polynomial() -> None:
    x = jnp.asarray([[[-3.0]], [[2e-5]], [[0.0]]])
    y = np.asarray(orthogonalize(x, ns_coeffs="you")).ravel()
    f = exact(np.ones((1, 1)), "you").item()
    np.testing.assert_allclose(y, [-f, f, 0], atol=TOLERANCE["float32"])


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 5), (3, 5, 0), (0, 0), (2, 0, 4, 4)])
@pytest.mark.parametrize("method", ["auto", "svd"])
def test_empty_arrays(shape, method: str) -> None:
    y = orthogonalize(jnp.zeros(shape, jnp.bfloat16), ns_method=method)
    assert y.shape == shape
    assert y.dtype == jnp.bfloat16


def test_non_finite_input_stays_visible() -> None:
    x = matrix((2, 6, 10), "float32")
    x[0, 1, 2] = np.inf
    y = np.asarray(orthogonalize(jnp.asarray(x)))
    assert np.isnan(y[0]).any()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_dtype_is_kept(dtype: str, method: str) -> None:
    x = jnp.asarray(matrix((4, 16), "float32"), dtype)
    y = orthogonalize(x, ns_method=method)
    assert y.dtype == dtype
    reference = orthogonalize(x.astype(jnp.float32), ns_method=method)
    np.testing.assert_allclose(
        np.asarray(y, np.float32), reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("method", METHODS)
def test_gram_and_plain_agree(method: str) -> None:
    # Ill-conditioned input, where the Gram form is at its worst.
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.normal(size=(32, 32)))
    v, _ = np.linalg.qr(rng.normal(size=(128, 32)))
    x = ((u * np.logspace(0, -3, 32)) @ v.T).astype(np.float32)
    for name in ("keller_jordan", "you", "polar_express_1.05", "deepseek_v4"):
        y = orthogonalize(jnp.asarray(x), ns_coeffs=name, ns_method=method)
        error = np.linalg.norm(y - exact(x.astype(np.float64), name))
        # deepseek_v4 amplifies the rounding of the input 160 times more than five steps do.
        assert error / np.sqrt(32) < (5e-3 if name == "deepseek_v4" else 5e-4), name


@pytest.mark.parametrize("method", [*METHODS, "svd"])
@pytest.mark.usefixtures("float64")
def test_batches_jit_vmap_and_shapes(method: str) -> None:
    # Programs of other shapes round differently, and the default rows are steep.
    x = jnp.asarray(matrix((1, 2, 6, 10)))
    apply = functools.partial(apply_polar, plan_polar(ns_method=method))
    one = jax.jit(apply)
    expected = np.stack([[one(x[0, 0]), one(x[0, 1])]])
    for y in (apply(x), jax.jit(apply)(x), jax.vmap(jax.vmap(apply))(x)):
        np.testing.assert_allclose(y, expected, rtol=0, atol=FLOAT64)
    shaped = jax.eval_shape(apply, jax.ShapeDtypeStruct((5, 9, 4), jnp.bfloat16))
    assert (shaped.shape, shaped.dtype) == ((5, 9, 4), jnp.bfloat16)


def test_traced_eps() -> None:
    x = jnp.asarray(matrix((4, 6), "float32"))
    plan = plan_polar()
    y = jax.jit(lambda x, eps: apply_polar(plan, x, eps))(x, 1e-6)
    np.testing.assert_allclose(y, apply_polar(plan, x), atol=TOLERANCE["float32"])


@pytest.mark.parametrize("method", METHODS)
def test_float32_products_ask_for_float32(method: str) -> None:
    apply = functools.partial(apply_polar, plan_polar(ns_method=method))
    x = jnp.zeros((4, 12))
    text = jax.jit(apply).lower(x).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots
    assert all("[HIGHEST, HIGHEST]" in line for line in dots)


@pytest.mark.parametrize(("method", "dtype"), [("standard", "bfloat16"), ("gram", "float16")])
def test_16_bit_products_accumulate_in_float32(method: str, dtype: str) -> None:
    apply = functools.partial(apply_polar, plan_polar(ns_method=method, ns_dtype=dtype))
    text = jax.jit(apply).lower(jnp.zeros((4, 12), jnp.bfloat16)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots
    assert all(line.rstrip().endswith("xf32>") for line in dots)


@pytest.mark.parametrize("spec", [("x", None, None), (None, "x", None), (None, None, "x")])
@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2], ids=str)
def test_sharded_operands(spec, axis_type) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:2])
    x = jnp.asarray(matrix((4, 4, 8), "float32"))
    apply = jax.jit(functools.partial(apply_polar, plan_polar(ns_method="standard")))
    y = apply(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))))
    np.testing.assert_allclose(y, apply(x), atol=TOLERANCE["float32"])


def test_plan_is_a_value() -> None:
    plan = plan_polar("dion", ns_dtype=jnp.bfloat16)
    assert plan == PolarPlan(COEFFICIENT_SETS["you"].rows, "auto", "bfloat16", "frobenius")
    assert hash(plan) == hash(plan_polar("you", 5, ns_dtype="bfloat16"))
    assert plan_polar("minimax4").preconditioning == "schatten8"
    assert plan_polar("minimax4", preconditioning="frobenius").preconditioning == "frobenius"
    assert plan_polar("turbo", preconditioning="aol") == plan_polar("turbo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ns_method": "newton"},
            "ns_method='newton' is not known. Pass one of 'auto', 'standard', 'gram', 'svd'",
        ),
        ({"ns_dtype": "int8"}, "ns_dtype='int8' is not known. Pass one of 'float64'"),
        ({"ns_dtype": "half precision"}, "ns_dtype='half precision' is not known"),
        (
            {"preconditioning": "l2"},
            "preconditioning='l2' is not known. Pass one of 'frobenius', 'spectral', 'aol'",
        ),
        (
            {"ns_coeffs": "turbo", "preconditioning": "frobenius"},
            "made for preconditioning='aol', got 'frobenius'",
        ),
        ({"ns_coeffs": (-1.0, 0.0, 0.0)}, "turn the singular value .* negative"),
        ({"ns_coeffs": "jordan"}, "'jordan' is no coefficient set"),
        ({"ns_coeffs": "you", "ns_steps": 9}, "more than the 5 rows of 'you'"),
    ],
)
def test_wrong_arguments(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(jnp.ones((2, 3)), **arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (jnp.ones(3), ValueError, r"shape \(\.\.\., m, n\), got shape \(3,\)"),
        (jnp.ones((2, 3), jnp.int32), TypeError, "got dtype int32. Convert it first"),
    ],
)
def test_wrong_arrays(x, error, message: str) -> None:
    # The annotations refuse these first in tests; users run without them.
    undecorated = getattr(apply_polar, "__wrapped__", apply_polar)
    with pytest.raises(error, match=message):
        undecorated(plan_polar(), x)


@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_explicit_axes_of_length_one_are_kept(method: str) -> None:
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((1, 2), ("a", "b"), axis_types=kinds, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("a", "b")
        x = jax.device_put(jnp.ones((1, 2, 3, 4)), jax.NamedSharding(mesh, spec))
        y, _ = jax.lax.scan(lambda c, _: (orthogonalize(c, ns_method=method), None), x, length=1)
        assert jax.typeof(y) == jax.typeof(x)
