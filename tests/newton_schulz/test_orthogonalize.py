"""`orthogonalize` against the scalar polynomial, the SVD, golden float64 values and Optax."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib._muon import orthogonalize_via_newton_schulz

from muonclip_jax.newton_schulz import (
    COEFFICIENT_SETS,
    PRECONDITIONINGS,
    PolarPlan,
    apply_polar,
    apply_polar_by_columns,
    orthogonalize,
    plan_polar,
    products,
)
from muonclip_jax.newton_schulz.coefficients import evaluate, resolve_coefficients
from muonclip_jax.newton_schulz.stability import GROWTH, guard_rows
from tests.helpers import TOLERANCE, polynomial_of_singular_values

KJ = (3.4445, -4.7750, 2.0315)
METHODS = ("standard", "gram")
GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden" / "newton_schulz_float64.json").read_text()
)
# Products commute with rounding in no set: an error of one step grows by the slope at zero, up to
# 8e4 (deepseek_v4), times 1e-16.
FLOAT64 = 1e-9


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def jitted(x: Any, **options: Any) -> jax.Array:
    """One program: where a shape is met once, its operations alone would be one each."""
    return jax.jit(functools.partial(orthogonalize, **options))(jnp.asarray(x))


def matrix(shape, dtype="float64", seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if np.issubdtype(np.dtype(dtype), np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return x.astype(dtype)


def with_singular_values(values: np.ndarray, columns: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    u, v = (
        np.linalg.qr(rng.normal(size=(size, len(values))))[0] for size in (len(values), columns)
    )
    return (u * values) @ v.T


def exact(x: np.ndarray, ns_coeffs, preconditioning=None, eps: float = 0.0) -> np.ndarray:
    """Rescales by the preconditioning's definition, and applies the polynomial, in float64."""
    if x.shape[-2] > x.shape[-1]:
        return np.swapaxes(exact(np.swapaxes(x, -1, -2), ns_coeffs, preconditioning), -1, -2)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    rows, source = resolve_coefficients(ns_coeffs)
    preconditioning = preconditioning or source.preconditioning
    if preconditioning == "aol":
        product = x @ np.conj(np.swapaxes(x, -1, -2))
        norm = np.sqrt(np.abs(product).sum(axis=-1))[..., None]
    else:
        power = {"frobenius": 2, "schatten": 4, "schatten8": 8, "spectral": np.inf}
        values = np.linalg.svd(x, compute_uv=False)
        norm = np.linalg.norm(values, ord=power[preconditioning], axis=-1)[..., None, None]
    return polynomial_of_singular_values(x / (norm + eps), list(rows))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 12), "float64"),
        ((12, 5), "complex128"),
        ((7, 7), "complex128"),
        ((2, 6, 10), "float64"),
        ((2, 2, 9, 4), "float64"),
        ((1, 6), "complex128"),
        ((6, 1), "float64"),
        ((1, 1), "float64"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("float64")
def test_is_the_polynomial_of_the_singular_values(shape, dtype: str, method: str) -> None:
    x = matrix(shape, dtype)
    y = jitted(x, ns_coeffs="keller_jordan", ns_method=method)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, exact(x, "keller_jordan"), atol=FLOAT64)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_every_set(name: str) -> None:
    rows, x = COEFFICIENT_SETS[name].rows, matrix((2, 6, 10))
    with jax.enable_x64(True):
        for method in METHODS:
            y = jitted(x, ns_coeffs=name, ns_method=method)
            np.testing.assert_allclose(y, exact(x, name), atol=FLOAT64)
    # In float32 rounding, or the guard of steep sets, comes out multiplied by the steepest slope.
    x = x.astype(np.float32)
    slope = np.abs(np.diff(evaluate(rows, np.linspace(0, 1, 1_000_001)))).max() * 1e6
    relative = 2.0**-24 if guard_rows(rows, "float32") == rows else GROWTH["float32"]
    atol = max(TOLERANCE["float32"], slope * relative)
    np.testing.assert_allclose(jitted(x, ns_coeffs=name), exact(x, name), atol=atol)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize(
    ("method", "dtype", "shape"),
    [("standard", "float64", (2, 6, 10)), ("gram", "complex128", (2, 10, 6))],
)
@pytest.mark.usefixtures("float64")
def test_preconditioning_is_its_definition(preconditioning, method, dtype, shape) -> None:
    x = matrix(shape, dtype)
    y = jitted(x, ns_coeffs=KJ, preconditioning=preconditioning, ns_method=method)
    np.testing.assert_allclose(y, exact(x, KJ, preconditioning), atol=FLOAT64)


GOLDEN_SETS = {
    "simple(KJ)x5": ("keller_jordan", None),
    "KJx10": ("keller_jordan", 10),
    "quintic(You)": ("quintic", None),
    "PE GNS(/1.05) 5": ("polar_express_1.05", 5),
    "CANS 5": ("cans", None),
    "deepseekv4 10": ("deepseek_v4", None),
}


@pytest.mark.parametrize("name", GOLDEN["sets"])
@pytest.mark.usefixtures("float64")
def test_golden_float64(name: str) -> None:
    x = np.sin(0.7 * np.arange(96)) + 0.5 * np.cos(0.13 * np.arange(96) ** 2)
    x = jnp.asarray(x.reshape(8, 12))
    golden = GOLDEN["sets"][name]
    out, rows = np.asarray(golden["out"]).reshape(8, 12), golden["coeffs"]
    if "1.02 norm" in name:  # that run divides by 1.02 times the norm
        (a, b, c), s = rows[0], 1.02
        rows = [(a / s, b / s**3, c / s**5), *rows[1:]]
    for method in METHODS:
        plan = PolarPlan(tuple(map(tuple, rows)), method, None, "frobenius")
        np.testing.assert_allclose(jax.jit(apply_polar, static_argnums=0)(plan, x), out, atol=1e-9)
    if name in GOLDEN_SETS:
        coeffs, steps = GOLDEN_SETS[name]
        np.testing.assert_allclose(jitted(x, ns_coeffs=coeffs, ns_steps=steps), out, atol=1e-9)


@pytest.mark.parametrize(
    ("preconditioning", "dtype", "shape"),
    [
        ("frobenius", "float32", (6, 10)),
        ("frobenius", "complex64", (10, 6)),
        ("spectral", "float32", (10, 6)),
        ("aol", "complex64", (6, 10)),
        ("schatten", "float32", (10, 6)),  # complex: Optax forms x x^T without the conjugate
    ],
)
def test_optax_parity(preconditioning, dtype: str, shape) -> None:
    x = jnp.asarray(matrix(shape, dtype))
    theirs = orthogonalize_via_newton_schulz(x, jnp.asarray(KJ), 5, preconditioning)
    ours = jitted(x, ns_coeffs="keller_jordan", preconditioning=preconditioning)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("shape", [(3, 5, 9), (9, 5), (6, 6)])
def test_svd_is_the_polar_factor(shape, dtype: str) -> None:
    x = matrix(shape, dtype)
    u, _, vh = np.linalg.svd(x.astype(np.complex128), full_matrices=False)
    y = jitted(x, ns_method="svd")
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, u @ vh, atol=TOLERANCE["float32"])
    outer = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 7.0)).astype(dtype)
    y = jitted(outer, ns_method="svd")  # of low rank: no direction is added
    np.testing.assert_allclose(y, outer / np.linalg.norm(outer), atol=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("keller_jordan", "standard", "float32"),
        ("turbo", "gram", "bfloat16"),
        ("minimax4", "gram", "float32"),
        ("minimax4", "standard", "bfloat16"),
        ("minimax4", "svd", "float32"),
        ("keller_jordan", "standard", "float64"),
        ("keller_jordan", "gram", "complex64"),
    ],
)
def test_scale_does_not_matter_and_a_power_of_two_changes_no_bit(name, method, dtype) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(matrix((6, 10), dtype if dtype != "bfloat16" else "float32"), dtype)
        apply = jax.jit(functools.partial(apply_polar, plan_polar(name, ns_method=method)))
        expected = np.asarray(apply(x))
        info = jnp.finfo(dtype)
        digits, lowest, highest = max(info.nmant, 14), info.minexp, info.maxexp
        # From where a smaller entry would lose digits to where the largest one would overflow.
        for power in (lowest + digits, lowest // 2, -1, 1, highest // 2, highest - 4):
            scaled = apply(x * jnp.asarray(2.0**power, x.real.dtype))
            np.testing.assert_array_equal(np.asarray(scaled), expected)
        # Another scale rounds the input, which the steps amplify.
        y = np.asarray(apply(x * jnp.asarray(1e-9, x.real.dtype))).astype(np.complex128)
        atol = 5e-2 if dtype == "bfloat16" else 1e-4
        np.testing.assert_allclose(y, expected.astype(np.complex128), atol=atol)


@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_extreme_entries(method: str) -> None:
    apply = jax.jit(functools.partial(apply_polar, plan_polar("you", ns_method=method)))
    x = matrix((4, 6), "float32")
    expected = apply(jnp.asarray(x))
    largest = (x * (3e38 / np.abs(x).max())).astype(np.float32)
    np.testing.assert_allclose(apply(jnp.asarray(largest)), expected, atol=1e-4)
    # Some entries subnormal, then all of them; there 1e-45 / scale is lost by the input's rounding.
    for scale in (1e-36, 1e-38, 1e-40):
        y = apply(jnp.asarray((x * scale).astype(np.float32)))
        np.testing.assert_allclose(y, expected, atol=1e-4 + 500e-45 / scale)
    # Their multiples of the smallest number, 2^-149, are the matrix.
    multiples = np.random.default_rng(0).integers(-1000, 1000, (4, 6)).astype(np.float32)
    subnormal = (multiples.astype(np.float64) * 2.0**-149).astype(np.float32)
    np.testing.assert_array_equal(apply(jnp.asarray(subnormal)), apply(jnp.asarray(multiples)))


def test_subnormal_bfloat16_and_complex_and_float16_at_the_ends_of_its_range() -> None:
    x = matrix((4, 6), "complex64")
    y = jitted((x.astype(np.complex128) * 1e-39).astype(np.complex64))
    np.testing.assert_allclose(y, jitted(x), atol=1e-3)
    power = jnp.asarray(np.ldexp(1.0, [[-120, -126, -130]]), jnp.bfloat16)
    y = np.asarray(orthogonalize(power, ns_coeffs="you"), np.float32)
    np.testing.assert_allclose(y[0] / y[0, 0], [1, 2.0**-6, 2.0**-10], rtol=1e-2)
    for scale in (1e-4, 2e4):  # subnormal entries; squares past 65504
        y = jitted(jnp.asarray(np.real(x) * scale, jnp.float16))
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(y, np.float32), jitted(np.real(x)), atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "preconditioning"),
    [("float32", name) for name in PRECONDITIONINGS]
    + [(dtype, "frobenius") for dtype in ("bfloat16", "float16", "complex64")],
)
@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_zero_gives_zero(dtype: str, preconditioning: str, method: str) -> None:
    eye = np.eye(6, 10)
    x = jnp.asarray(np.stack([eye, 0 * eye, eye * (np.arange(6) != 1)[:, None]]), dtype)
    y = jitted(x, preconditioning=preconditioning, ns_method=method)
    assert y.dtype == x.dtype
    found = np.asarray(y, np.complex64)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[2, 1], 0)
    assert (np.abs(np.diag(found[0])) > 0.5).all()


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_rank_one_keeps_its_direction(name: str) -> None:
    x = np.outer(np.arange(1.0, 5.0), np.linspace(-1, 1, 7)).astype(np.float32)
    y = np.asarray(orthogonalize(jnp.asarray(x), ns_coeffs=name))
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    # AOL rescales the rows, so there the direction is another.
    assert cosine > (0.8 if name == "turbo" else 0.99)


def test_one_entry_is_its_sign_on_the_polynomial_and_non_finite_input_stays_visible() -> None:
    x = jnp.asarray([[[-3.0]], [[2e-5]], [[0.0]], [[np.inf]]])
    y = np.asarray(orthogonalize(x, ns_coeffs="you")).ravel()
    f = exact(np.ones((1, 1)), "you").item()
    np.testing.assert_allclose(y, [-f, f, 0, np.nan], atol=TOLERANCE["float32"])


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 5), (3, 5, 0), (0, 0), (2, 0, 4, 4)])
def test_empty_arrays(shape) -> None:
    for method in ("auto", "svd"):
        y = orthogonalize(jnp.zeros(shape, jnp.bfloat16), ns_method=method)
        assert (y.shape, y.dtype) == (shape, jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_16_bit_input_is_computed_in_float32_on_a_cpu(dtype: str, method: str) -> None:
    x = jnp.asarray(matrix((4, 16), "float32"), dtype)
    y = jitted(x, ns_method=method)
    assert y.dtype == dtype
    reference = jitted(x.astype(jnp.float32), ns_method=method)
    found, tolerance = np.asarray(y, np.float32), TOLERANCE[dtype]
    np.testing.assert_allclose(found, reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_ill_conditioned_matrices(method: str) -> None:
    x = with_singular_values(np.logspace(0, -3, 32), 128).astype(np.float32)
    for name in ("keller_jordan", "you", "polar_express_1.05", "deepseek_v4"):
        error = np.linalg.norm(jitted(x, ns_coeffs=name, ns_method=method) - exact(x, name))
        # deepseek_v4 amplifies the rounding of the input 160 times more than five steps do.
        assert error / np.sqrt(32) < (5e-3 if name == "deepseek_v4" else 5e-4), name


@pytest.mark.parametrize("method", [*METHODS, "svd"])
@pytest.mark.usefixtures("float64")
def test_batches_vmap_shapes_and_eps(method: str) -> None:
    x = jnp.asarray(matrix((1, 2, 6, 10)))
    apply = functools.partial(apply_polar, plan_polar(ns_method=method))
    one = jax.jit(apply)
    expected = np.stack([[one(x[0, 0]), one(x[0, 1])]])
    # Programs of other shapes round differently, and the default rows are steep.
    for y in (apply(x), one(x), jax.vmap(jax.vmap(apply))(x), one(x, 1e-6)):
        np.testing.assert_allclose(y, expected, rtol=0, atol=FLOAT64)
    shaped = jax.eval_shape(apply, jax.ShapeDtypeStruct((5, 9, 4), jnp.bfloat16))
    assert (shaped.shape, shaped.dtype) == ((5, 9, 4), jnp.bfloat16)


def _products(plan: PolarPlan, x: jax.Array) -> list[str]:
    text = jax.jit(functools.partial(apply_polar, plan)).lower(x).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots
    return dots


def test_products_are_in_float32_or_accumulate_there_and_a_batch_of_one_is_no_batch() -> None:
    for method in METHODS:
        dots = _products(plan_polar(ns_method=method), jnp.zeros((4, 12)))
        assert all("[HIGHEST, HIGHEST]" in line for line in dots)
        dtype = {"standard": "bfloat16", "gram": "float16"}[method]
        dots = _products(plan_polar(ns_method=method, ns_dtype=dtype), jnp.zeros((4, 12)))
        assert all(line.rstrip().endswith("xf32>") for line in dots)
    assert not any("batching" in d for d in _products(plan_polar(), jnp.zeros((1, 1, 12, 20))))
    assert all("batching" in d for d in _products(plan_polar(), jnp.zeros((1, 3, 12, 20))))


@pytest.mark.parametrize("spec", [("x", None, None), (None, "x", None), (None, None, "x")])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_operands(spec, axis_type) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:2])
    x = jnp.asarray(matrix((4, 4, 8), "float32"))
    apply = jax.jit(functools.partial(apply_polar, plan_polar(ns_method="standard")))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    y = apply(sharded)
    np.testing.assert_allclose(y, apply(x), atol=TOLERANCE["float32"])
    if axis_type == AxisType.Explicit:
        assert y.sharding.is_equivalent_to(sharded.sharding, 3)


@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_explicit_axes_of_length_one_are_kept(method: str) -> None:
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((1, 2), ("a", "b"), axis_types=kinds, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 2, 3, 4)), NamedSharding(mesh, PartitionSpec("a", "b")))
        y, _ = jax.lax.scan(lambda c, _: (orthogonalize(c, ns_method=method), None), x, length=1)
        assert jax.typeof(y) == jax.typeof(x)


def by_columns(plan: PolarPlan, x: np.ndarray, eps: float = 1e-7) -> jax.Array:
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    columns = PartitionSpec(None, None, "tp")
    polar = functools.partial(apply_polar_by_columns, plan, axes=("tp",), eps=eps)
    return jax.jit(jax.shard_map(polar, mesh=mesh, in_specs=columns, out_specs=columns))(x)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_two_devices_that_share_columns(preconditioning: str) -> None:
    rows = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    x = matrix((2, 3, 8), "float32")  # two devices do not divide three rows
    y = by_columns(plan_polar(rows, preconditioning=preconditioning), x)
    np.testing.assert_allclose(y, exact(x, rows, preconditioning), atol=TOLERANCE["float32"])


def test_two_devices_share_zero_subnormal_numbers_eps_and_the_svd() -> None:
    row, x = ((2.0, -1.5, 0.5),), matrix((2, 3, 8), "float32")
    relative, absolute = (plan_polar(row, relative_eps=each) for each in (True, False))
    near = functools.partial(np.testing.assert_allclose, atol=TOLERANCE["float32"])
    near(by_columns(relative, x * np.float32(2.0**-140)), exact(x * np.float32(2.0**-140), row))
    # An eps that is not relative is added to the norm as it is; the other guards zero alone.
    near(by_columns(absolute, x * np.float32(1e-7)), exact(x * np.float32(1e-7), row, eps=1e-7))
    near(by_columns(relative, x * np.float32(1e-7)), exact(x, row))
    for plan in (relative, absolute):
        assert jnp.all(by_columns(plan, 0 * x) == 0)
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    near(by_columns(plan_polar(ns_method="svd"), x), u @ vh)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("float64")
def test_split_products_are_the_same_products(method: str, monkeypatch) -> None:
    # Large matrices on a CPU compute one triangle of 2 x 2 blocks; here small ones do too.
    monkeypatch.setattr(products, "SPLIT_FROM", 2)
    for shape, dtype in (((2, 6, 12), "complex128"), ((2, 7, 12), "float64")):
        x = matrix(shape, dtype)
        y = jitted(x, ns_coeffs="minimax4", ns_method=method)
        np.testing.assert_allclose(y, exact(x, "minimax4"), atol=FLOAT64)


# Published AOL coefficients of another library: 4.0098 - 7.0585 + 2.4635 < 0 at one.
AOL_ROWS = GOLDEN["sets"]["aol EO 4 (Frobenius norm)"]["coeffs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ns_method": "newton"}, "'newton' is not known. Pass one of 'auto', 'standard', 'gram',"),
        ({"ns_dtype": "int8"}, "ns_dtype='int8' is not known. Pass one of 'float64'"),
        ({"ns_dtype": "half precision"}, "ns_dtype='half precision' is not known"),
        ({"preconditioning": "l2"}, "preconditioning='l2' is not known. Pass one of 'frobenius'"),
        (
            {"ns_coeffs": "turbo", "preconditioning": "frobenius"},
            "made for preconditioning='aol', got 'frobenius'",
        ),
        ({"ns_coeffs": (-1.0, 0.0, 0.0)}, "turn the singular value .* negative"),
        ({"ns_coeffs": AOL_ROWS}, "turn the singular value .* negative"),
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
