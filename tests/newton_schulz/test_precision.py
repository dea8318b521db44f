"""Which form and dtype are chosen, and that nothing diverges in any of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.counting import count_products, full_flops
from muonclip_jax.newton_schulz import COEFFICIENT_SETS, apply_polar, plan_polar
from muonclip_jax.newton_schulz.generators import evaluate
from muonclip_jax.newton_schulz.gram import gram_flops
from muonclip_jax.newton_schulz.newton_schulz import plain_flops
from muonclip_jax.newton_schulz.precision import choose_dtype, choose_method, guarded_rows
from tests.helpers import equations

KJ = COEFFICIENT_SETS["keller_jordan"].rows
WIDE, SQUARE = (64, 256), (64, 64)


@pytest.mark.parametrize(
    ("x_dtype", "ns_dtype", "method", "platform", "expected"),
    [
        ("float32", None, "standard", "cpu", "float32"),
        ("bfloat16", None, "standard", "cpu", "float32"),
        ("float32", None, "gram", "cpu", "float32"),
        ("float32", None, "standard", "gpu", "float16"),
        ("bfloat16", None, "gram", "gpu", "float16"),
        ("float32", None, "standard", "tpu", "bfloat16"),
        ("float32", None, "gram", "tpu", "float32"),
        ("float64", None, "standard", "gpu", "float64"),
        ("complex64", None, "gram", "gpu", "float32"),
        ("complex128", None, "gram", "tpu", "float64"),
        ("float32", None, "svd", "gpu", "float32"),
        ("float32", "bfloat16", "standard", "cpu", "bfloat16"),
        ("float64", "float32", "standard", "cpu", "float32"),
    ],
)
def test_dtype_rule(x_dtype, ns_dtype, method, platform, expected) -> None:
    assert choose_dtype(KJ, x_dtype, ns_dtype, method, platform) == expected


@pytest.mark.parametrize(
    ("x_dtype", "ns_dtype", "method", "message"),
    [
        ("complex64", "bfloat16", "standard", "not possible for input of dtype complex64"),
        ("float32", "float16", "svd", 'not possible for ns_method="svd"'),
        ("float32", "float64", "standard", "jax_enable_x64"),
    ],
)
def test_impossible_dtypes(x_dtype, ns_dtype, method, message) -> None:
    with pytest.raises(ValueError, match=message):
        choose_dtype(KJ, x_dtype, ns_dtype, method, "cpu")


@pytest.mark.parametrize(
    ("shape", "ns_dtype", "platform", "rows", "expected"),
    [
        (WIDE, None, "cpu", KJ, "gram"),
        (WIDE[::-1], None, "cpu", KJ, "gram"),
        (SQUARE, None, "cpu", KJ, "standard"),
        (WIDE, None, "gpu", KJ, "gram"),
        (WIDE, "bfloat16", "gpu", KJ, "standard"),
        (WIDE, None, "tpu", KJ, "standard"),
        (WIDE, None, "gpu", KJ * 5, "standard"),
        (WIDE, None, "cpu", COEFFICIENT_SETS["cans"].rows, "gram"),
    ],
)
def test_auto(shape, ns_dtype, platform, rows, expected) -> None:
    assert choose_method(rows, "auto", "float32", ns_dtype, platform, *shape) == expected


def test_flops_count_the_products_of_the_program() -> None:
    # XLA's own count of the compiled program, whose products dominate at this size.
    x = jax.ShapeDtypeStruct((128, 512), jnp.float32)
    for method, restarts in (("standard", ()), ("gram", ())):
        plan = plan_polar("keller_jordan", ns_method=method)
        compiled = jax.jit(lambda y, plan=plan: apply_polar(plan, y)).lower(x).compile()
        counted = (
            plain_flops(KJ, 128, 512)
            if method == "standard"
            else gram_flops(KJ, 128, 512, restarts)
        )
        cost = compiled.cost_analysis()
        assert cost is not None
        assert cost["flops"] == pytest.approx(counted, rel=0.05)


def test_guard_leaves_safe_sets_alone() -> None:
    for name in ("keller_jordan", "you", "polar_express_1.05", "deepseek_v4", "turbo"):
        rows = COEFFICIENT_SETS[name].rows
        for dtype in ("float64", "float32", "float16", "bfloat16"):
            assert guarded_rows(rows, dtype) == rows, (name, dtype)
    for name, dataset in COEFFICIENT_SETS.items():
        assert guarded_rows(dataset.rows, "float64") == dataset.rows, name


def test_guard_gives_steep_sets_room() -> None:
    rows = COEFFICIENT_SETS["cans"].rows
    assert abs(evaluate(rows, 1.004)) > 1e3
    assert abs(evaluate(guarded_rows(rows, "bfloat16"), 1.004)) < 1.2


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_a_power_of_two_changes_no_bit(dtype: str) -> None:
    rng = np.random.default_rng(0)
    real = np.dtype(dtype).type(0).real.dtype
    x = rng.normal(size=(12, 20)).astype(dtype)
    if np.iscomplexobj(x):
        x = (x + 1j * rng.normal(size=x.shape)).astype(dtype)
    digits, lowest, highest = np.finfo(real).nmant, np.finfo(real).minexp, np.finfo(real).maxexp
    with jax.enable_x64(real == "float64"):
        apply = jax.jit(functools.partial(apply_polar, plan_polar("keller_jordan")))
        expected = np.asarray(apply(jnp.asarray(x)))
        # From where a smaller entry would lose digits to where the largest one would overflow.
        for power in (lowest + digits, lowest // 2, -1, 1, highest // 2, highest - 4):
            np.testing.assert_array_equal(apply(jnp.asarray(x * real.type(2.0**power))), expected)


def test_a_matrix_of_subnormal_numbers_is_like_any_other() -> None:
    # Their multiples of the smallest number, 2^-149, are the matrix.
    multiples = np.random.default_rng(0).integers(-1000, 1000, (12, 20)).astype(np.float32)
    subnormal = (multiples.astype(np.float64) * 2.0**-149).astype(np.float32)
    apply = jax.jit(functools.partial(apply_polar, plan_polar("keller_jordan")))
    np.testing.assert_array_equal(apply(jnp.asarray(subnormal)), apply(jnp.asarray(multiples)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("preconditioning", ["frobenius", "aol", "schatten", "schatten8"])
def test_no_product_is_computed_twice(preconditioning: str, method: str, dtype: str) -> None:
    # The bounds are free: what they are norms of, the first step uses; but for one in 16 bits.
    if (method, dtype) == ("gram", "bfloat16"):
        dtype = "float16"
    plan = plan_polar(
        "keller_jordan", ns_method=method, ns_dtype=dtype, preconditioning=preconditioning
    )
    x = jnp.ones((48, 192), jnp.float32)
    assert plan.resolve(x.shape, x.dtype).squares_apart == (
        preconditioning == "schatten8" and dtype != "float32"
    )
    jaxpr = jax.make_jaxpr(functools.partial(apply_polar, plan))(x)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    resolved = plan.resolve(x.shape, x.dtype)
    assert len(products) == sum(count_products(resolved).values())
    assert resolved.flops == full_flops(resolved, *x.shape)


def test_a_batch_of_one_is_no_batch() -> None:
    def products(*shape: int) -> list[tuple[int, ...]]:
        jaxpr = jax.make_jaxpr(functools.partial(apply_polar, plan_polar()))(jnp.ones(shape))
        return [
            equation.outvars[0].aval.shape
            for equation in equations(jaxpr.jaxpr)
            if equation.primitive.name == "dot_general"
        ]

    assert products(1, 1, 12, 20) == products(12, 20) != []
    assert {len(shape) for shape in products(1, 3, 12, 20)} == {3}


def with_singular_values(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    u, v = (np.linalg.qr(rng.normal(size=(size, 32)))[0] for size in (32, 96))
    return (u * values) @ v.T


SPECTRA = {
    "rank one": lambda rng: np.outer(rng.normal(size=32), rng.normal(size=96)),
    "all ones": lambda rng: np.ones((32, 96)),
    "one large entry": lambda rng: np.eye(32, 96) * ([1.0] + [1e-4] * 95),
    "rank two": lambda rng: rng.normal(size=(32, 2)) @ rng.normal(size=(2, 96)),
    "low rank and noise": lambda rng: (
        rng.normal(size=(32, 4)) @ rng.normal(size=(4, 96)) + 0.02 * rng.normal(size=(32, 96))
    ),
    "log-spaced": lambda rng: with_singular_values(np.logspace(0, -3, 32), rng),
    "power law": lambda rng: with_singular_values(1 / np.arange(1, 33), rng),
    "flat": lambda rng: with_singular_values(np.ones(32), rng),
    **{f"gaussian {number}": lambda rng: rng.normal(size=(32, 96)) for number in range(8)},
}


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_no_singular_value_leaves_the_range_of_the_set(name: str, dtype: str, method: str) -> None:
    if (method, dtype) == ("gram", "bfloat16"):
        with pytest.raises(ValueError, match="unstable"):
            plan_polar(name, ns_method=method, ns_dtype=dtype)
        return
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.stack([f(rng) for f in SPECTRA.values()]), jnp.float32)
    plan = plan_polar(name, ns_method=method, ns_dtype=dtype)
    with jax.disable_jit():  # each 16-bit rounding really takes place
        y = np.asarray(apply_polar(plan, x), np.float64)
    assert np.isfinite(y).all()
    largest = np.linalg.norm(y, ord=2, axis=(-2, -1))
    # The largest value of the polynomial on [0, 1]: 1.2 for minimax4 and keller_jordan. Sets whose
    # rows are exact to the edge of their intervals leave it a little in the Gram form.
    top = evaluate(COEFFICIENT_SETS[name].rows, np.linspace(0, 1, 100_001)).max()
    edge = name == "cans" and (method, dtype) == ("gram", "float16")
    np.testing.assert_array_less(largest, top + (0.06 if edge else 0.015))
    # and none of them points backwards
    assert ((np.asarray(x) * y).sum(axis=(-2, -1)) > 0).all()


# Relative distance from the same polynomial in float64, Gaussian matrices; the documented bounds.
BOUNDS = {
    ("standard", "float32"): 5e-6,
    ("standard", "float16"): 4e-3,
    ("standard", "bfloat16"): 3e-2,
    ("gram", "float32"): 2e-5,
    ("gram", "float16"): 8e-3,
}


@pytest.mark.parametrize(("method", "dtype"), BOUNDS)
@pytest.mark.parametrize("name", ["keller_jordan", "you", "polar_express_1.05", "deepseek_v4"])
def test_error_bounds(name: str, method: str, dtype: str) -> None:
    x = np.random.default_rng(1).normal(size=(48, 192)).astype(np.float32)
    u, s, vh = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    exact = (u * evaluate(COEFFICIENT_SETS[name].rows, s / np.linalg.norm(s))) @ vh
    plan = plan_polar(name, ns_method=method, ns_dtype=dtype)
    with jax.disable_jit():
        y = np.asarray(apply_polar(plan, jnp.asarray(x)), np.float64)
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < BOUNDS[method, dtype]
