"""The symmetric products: every implementation against float64, symmetric to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.kernels.symmetric import (
    IMPLEMENTATIONS,
    dispatch,
    gram,
    matmul_add,
    mosaic_gpu,
    mosaic_tpu,
    symmetric_product,
    triton,
)
from muonclip_jax.kernels.symmetric.operations import _symmetric
from muonclip_jax.kernels.symmetric.problem import Problem
from muonclip_jax.kernels.symmetric.tilings import TILINGS, choose_tiling
from muonclip_jax.kernels.symmetric.triangle import triangle_count
from tests.helpers import TOLERANCE, lowered
from tests.kernels.symmetric.interpreted import interpret_hopper

# One tile, several, ragged in rows, in depth, in both; stacks.
SHAPES = [(1, 128, 128), (1, 384, 256), (1, 130, 128), (2, 128, 200), (3, 300, 40), (1, 5, 7)]
INTERPRETED = {
    "mosaic_tpu": functools.partial(mosaic_tpu.run, interpret=True),
    "triton": functools.partial(triton.run, interpret=True),
}
DTYPES = {"mosaic_tpu": ["bfloat16", "float32"], "triton": ["bfloat16", "float16"]}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Lets kernels run on a CPU."""
    for name, run in INTERPRETED.items():
        implementation = dispatch.KERNELS[name]
        monkeypatch.setitem(
            dispatch.KERNELS,
            name,
            dispatch.Implementation(run, implementation.refusal, implementation.platform),
        )


def _draw(*shape, dtype="float32", seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x / np.sqrt(shape[-1]), dtype)


def _hermitian(*shape, dtype="float32", seed=0):
    x = _draw(*shape, shape[-1], dtype="float32", seed=seed)
    return (x + jnp.swapaxes(x, -1, -2)).astype(dtype)


def _exact(x, y, addend, alpha, beta):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    result = alpha * (x @ y)
    return result if addend is None else result + beta * np.asarray(addend, np.float64)


def _check(actual, expected, dtype):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=TOLERANCE[dtype] * scale
    )


def _assert_symmetric(x):
    x = np.asarray(x, np.float32)
    np.testing.assert_array_equal(x, np.swapaxes(x, -1, -2))


CASES = [
    (name, dtype, shape)
    for name in ("xla", *INTERPRETED)
    for dtype in DTYPES.get(name, ["bfloat16", "float32"])
    for shape in (SHAPES if dtype == DTYPES.get(name, [dtype])[0] else SHAPES[:2])
]


@pytest.mark.parametrize(("name", "dtype", "shape"), CASES)
@pytest.mark.parametrize("with_addend", [False, True])
def test_gram_is_what_float64_says(name, dtype, shape, with_addend):
    x = _draw(*shape, dtype=dtype)
    addend = _hermitian(*shape[:2], dtype=dtype, seed=1) if with_addend else None
    actual = gram(x, addend, alpha=-0.5, beta=2.0, implementation=name)
    assert actual.dtype == x.dtype
    _check(actual, _exact(x, np.swapaxes(x, 1, 2), addend, -0.5, 2.0), dtype)
    if name != "xla":
        _assert_symmetric(actual)


@pytest.mark.parametrize("name", ["xla", *INTERPRETED])
@pytest.mark.parametrize("rows", [128, 300])
def test_the_product_of_two_polynomials_of_a_matrix_is_symmetric(name, rows):
    # Rounded to 16 bits the factors do not commute exactly; the upper triangle decides.
    r = _hermitian(2, rows, dtype="float32")
    x, y = r.astype("bfloat16"), (0.5 * r @ r - r).astype("bfloat16")
    actual = symmetric_product(
        x, y, x, alpha=2.0, beta=-3.0, out_dtype="float32", implementation=name
    )
    upper = np.triu(_exact(x, y, x, 2.0, -3.0))
    expected = upper + np.swapaxes(np.triu(upper, 1), 1, 2)
    if name == "xla":
        _check(actual, expected, "bfloat16")
    else:
        _check(actual, expected, "float32")
        _assert_symmetric(actual)


@pytest.mark.parametrize("name", INTERPRETED)
def test_what_lies_below_the_diagonal_of_the_addend_is_not_read(name):
    x, addend = _draw(1, 300, 64, dtype="bfloat16"), _hermitian(1, 300, dtype="bfloat16")
    below = jnp.tril(jnp.full((300, 300), jnp.nan, "bfloat16"), -1)
    expected = gram(x, addend, beta=1.0, implementation=name)
    actual = gram(x, addend + below, beta=1.0, implementation=name)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", INTERPRETED)
def test_a_part_of_an_array_that_is_not_there_adds_nothing(name):
    # Interpreted or real, what is read past the end of an array may be NaN.
    actual = gram(jnp.ones((1, 5, 7), "bfloat16"), implementation=name)
    np.testing.assert_array_equal(actual, jnp.full((1, 5, 5), 7, "bfloat16"))


@pytest.mark.parametrize("tiling", [
    pytest.param(TILINGS[2], id="128 x 128", marks=pytest.mark.slow),
    pytest.param(TILINGS[1], id="192 x 128", marks=pytest.mark.slow),
    pytest.param(TILINGS[0], id="256 x 128", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_the_hopper_kernel_is_what_float64_says(tiling, dtype, monkeypatch):
    interpret = interpret_hopper(monkeypatch, programs=1)
    # More steps than the ring has stages, and rows that whole tiles cover: unlike the copy
    # engine, the interpreter does not clip.
    rows = {128: 256, 192: 384, 256: 256}[tiling.height]
    r = _hermitian(1, rows, dtype="float32")
    x, y = r.astype(dtype), (r @ r).astype(dtype)
    addend = x + jnp.tril(jnp.full((rows, rows), jnp.nan, dtype), -64)
    actual = mosaic_gpu.run(
        x, y, addend, jnp.array([2.0, -3.0]), dtype, tiling=tiling, interpret=interpret
    )
    upper = np.triu(_exact(x, y, x, 2.0, -3.0))
    _check(actual, upper + np.swapaxes(np.triu(upper, 1), 1, 2), dtype)
    _assert_symmetric(actual)


@pytest.mark.slow
def test_the_hopper_kernel_without_symmetry_is_what_float64_says(monkeypatch):
    interpret = interpret_hopper(monkeypatch, programs=1)
    x, y = _draw(1, 128, 256, dtype="float16"), _draw(1, 256, 256, dtype="float16", seed=1)
    addend = _draw(1, 128, 256, dtype="float16", seed=2)
    actual = mosaic_gpu.run_matmul_add(
        x,
        y,
        addend,
        jnp.array([2.0, -3.0]),
        "float16",
        tiling=TILINGS[2],
        interpret=interpret,
    )
    _check(actual, _exact(x, y, addend, 2.0, -3.0), "float16")


@pytest.mark.parametrize("shape", [(1, 1024, 1024, 4096), (2, 1000, 1000, 2040)])
def test_the_kernel_without_symmetry_lowers(shape):
    batch, rows, depth, columns = shape
    x, y, addend = (
        jax.ShapeDtypeStruct((batch, *each), jnp.float16)
        for each in ((rows, depth), (depth, columns), (rows, columns))
    )
    run = functools.partial(matmul_add, beta=3.4, implementation="mosaic_gpu")
    assert "matmul_add" in lowered("cuda", run, x, y, addend)
    # It has to be named: nothing tells yet whether it is faster.
    assert (
        "mosaic"
        not in jax.jit(functools.partial(matmul_add, beta=3.4)).lower(x, y, addend).as_text()
    )


@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize(
    ("platform", "kernel", "dtype", "shape"),
    [
        ("tpu", mosaic_tpu, "bfloat16", (2, 1000, 2000)),
        ("tpu", mosaic_tpu, "float32", (1, 768, 768)),
        ("cuda", triton, "float16", (2, 1000, 2000)),
        ("cuda", mosaic_gpu, "bfloat16", (2, 1024, 2048)),
        ("cuda", mosaic_gpu, "float16", (1, 1000, 2000)),
        *(("cuda", mosaic_gpu, "bfloat16", (1, rows, 4096)) for rows in (2048, 2560)),
    ],
)
def test_kernels_lower_for_platforms_that_are_not_here(platform, kernel, dtype, shape, with_addend):
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    addend = jax.ShapeDtypeStruct((*shape[:2], shape[1]), jnp.dtype(dtype))
    factors = jax.ShapeDtypeStruct((2,), jnp.float32)
    run = functools.partial(kernel.run, out_dtype=dtype)
    text = lowered(platform, run, x, x, addend if with_addend else None, factors)
    assert "symmetric_product" in text


def _grid(kernel, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    factors = jax.ShapeDtypeStruct((2,), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x, f: kernel.run(x, x, None, f, "bfloat16"))(x, factors)
    call = next(each for each in jaxpr.jaxpr.eqns if each.primitive.name == "pallas_call")
    return call.params["grid_mapping"].grid


def test_only_the_triangle_is_launched():
    tiles, batch = _grid(triton, (3, 2048, 512))
    assert (tiles, batch) == (triangle_count(2048 // 128), 3)
    size = mosaic_tpu.tile_size(2048)
    batch, tiles, steps = _grid(mosaic_tpu, (3, 2048, 4096))
    # One step more than the depth has blocks: the transposed tile is written in it.
    assert (batch, tiles, steps) == (3, triangle_count(2048 // size), 4096 // 1024 + 1)
    tiling = choose_tiling(8, 4096)
    computed = len(tiling.table(4096)[0]) * tiling.height * tiling.width
    assert computed <= 0.535 * 4096**2


@pytest.mark.parametrize("name", ["xla", *INTERPRETED])
def test_vmap_is_a_longer_stack(name):
    x, addend = _draw(3, 2, 10, 24, dtype="bfloat16"), _hermitian(2, 10, dtype="bfloat16")
    run = functools.partial(gram, beta=1.0, implementation=name)
    actual = jax.jit(jax.vmap(run, in_axes=(0, None)))(x, addend)
    expected = run(x, jnp.broadcast_to(addend, (3, 2, 10, 10)))
    np.testing.assert_array_equal(actual, expected)
    factors = np.arange(3.0)
    scaled = jax.vmap(lambda x, alpha: run(x, addend, alpha=alpha))(x, jnp.asarray(factors))
    products = _exact(x, np.swapaxes(x, 2, 3), None, 1.0, 1.0)
    expected = factors[:, None, None, None] * products + np.asarray(addend, np.float64)
    _check(scaled, expected, "bfloat16")


@pytest.mark.parametrize("name", INTERPRETED)
def test_derivatives_are_those_of_the_reference(name):
    x, addend = _draw(1, 20, 30, dtype="bfloat16"), _hermitian(1, 20, dtype="bfloat16")
    weight = _draw(1, 20, 20, seed=2)

    def loss(implementation, x, addend, alpha):
        result = gram(
            x, addend, alpha=alpha, beta=2.0, out_dtype="float32", implementation=implementation
        )
        return jnp.vdot(weight, result)

    for actual, expected in zip(
        *(
            jax.grad(functools.partial(loss, each), (0, 1, 2))(x, addend, jnp.float32(0.7))
            for each in (name, "xla")
        ),
        strict=True,
    ):
        _check(actual, np.asarray(expected, np.float64), "bfloat16")


def test_one_kernel_serves_all_coefficients():
    x = _draw(1, 128, 128, dtype="bfloat16")

    def step(alpha, beta):
        return gram(x, x, alpha=alpha, beta=beta, implementation="triton")

    jaxprs = {str(jax.make_jaxpr(step)(alpha, beta)) for alpha, beta in ((1.0, 2.0), (3.0, 4.0))}
    assert len(jaxprs) == 1


@pytest.mark.parametrize("dtype", ["float32", "complex64", "float16"])
def test_none_takes_whatever_comes(dtype):
    x = _draw(2, 3, 4).astype(dtype)
    if dtype == "complex64":
        x = x + 1j * _draw(2, 3, 4, seed=1)
    expected = np.asarray(x) @ np.conj(np.swapaxes(np.asarray(x), 1, 2))
    np.testing.assert_allclose(gram(x), expected, rtol=3e-3 if dtype == "float16" else 1e-5)
    assert gram(x[:0]).shape == (0, 3, 3)
    assert gram(x[0, 0:1]).shape == (1, 1)


def test_matmul_add_is_what_float64_says():
    x, y, addend = _draw(2, 5, 6), _draw(2, 6, 7, seed=1), _draw(2, 5, 7, seed=2)
    actual = matmul_add(x, y, addend, alpha=2.0, beta=-1.0)
    _check(actual, _exact(x, y, addend, 2.0, -1.0), "float32")


@pytest.mark.parametrize(
    ("name", "x", "match"),
    [
        ("mosaic_tpu", jnp.ones((8, 8), "float16"), "bfloat16 or float32"),
        ("triton", jnp.ones((8, 8), "float32"), "bfloat16 or float16"),
        ("triton", jax.ShapeDtypeStruct((64, 8192, 8192), jnp.bfloat16), "32-bit"),
        ("mosaic_gpu", jnp.ones((8, 8), "bfloat16"), "256 x 128"),
        ("mosaic_gpu", jnp.ones((256, 256), "float32"), "bfloat16 or float16"),
        ("pallas", jnp.ones((8, 8), "bfloat16"), "no kernel for a cpu"),
    ],
)
def test_what_a_kernel_cannot_do_it_refuses_with_a_reason(name, x, match):
    with pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(functools.partial(gram, implementation=name), x)


def test_the_hopper_kernel_wants_one_dtype():
    x = jnp.ones((256, 256), "bfloat16")
    with pytest.raises(NotImplementedError, match="not symmetric"):
        matmul_add(x, x, implementation="triton")
    with pytest.raises(NotImplementedError, match="share one dtype"):
        gram(jnp.ones((256, 256), "bfloat16"), out_dtype="float32", implementation="mosaic_gpu")


def test_what_does_not_fit_is_an_error():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"addend of shape \(2, 4, 4\), expected \(2, 3, 3\)"):
        # Past the annotations, which the tests check first.
        _symmetric(x, None, jnp.ones((2, 4, 4)), 1.0, 1.0, None, None, None)
    with pytest.raises(ValueError, match="'cublas' is none of 'xla', 'pallas'"):
        gram(x, implementation="cublas")
    square = jnp.ones((2, 3, 3))
    with pytest.raises(ValueError, match="Cast one of them"):
        symmetric_product(square, square.astype("bfloat16"))
    assert set(dispatch.KERNELS) < set(IMPLEMENTATIONS)


HOPPER, AMPERE = dispatch.Target("gpu", (9, 0)), dispatch.Target("gpu", (8, 0))


@pytest.mark.parametrize(
    ("target", "alone", "shape", "dtype", "expected"),
    [
        (HOPPER, True, (1, 4096, 4096), "bfloat16", "mosaic_gpu"),
        (HOPPER, True, (24, 2048, 2048), "float16", "mosaic_gpu"),
        (HOPPER, False, (24, 2048, 2048), "float16", "xla"),
        # 136 tiles of 128 x 128 for 132 processors: half the tiles, as many rounds.
        (HOPPER, True, (1, 2048, 2048), "bfloat16", "xla"),
        (HOPPER, True, (1, 4096, 4096), "float32", "xla"),
        (AMPERE, True, (1, 4096, 4096), "bfloat16", "xla"),
        (dispatch.Target("gpu", (10, 0)), True, (1, 4096, 4096), "bfloat16", "xla"),
        (dispatch.Target("tpu"), True, (1, 4096, 4096), "bfloat16", "mosaic_tpu"),
        (dispatch.Target("tpu"), True, (1, 512, 4096), "bfloat16", "xla"),
        (dispatch.Target("cpu"), True, (1, 4096, 4096), "bfloat16", "xla"),
    ],
)
def test_none_picks_a_kernel_where_it_saves_rounds(
    monkeypatch, target, alone, shape, dtype, expected
):
    monkeypatch.setattr(dispatch, "current_target", lambda platform=None: target)
    monkeypatch.setattr(dispatch, "is_alone", lambda: alone)
    problem = Problem(*shape, dtype=dtype, addend_dtype=None, out_dtype=dtype)
    assert dispatch.choose(problem, None) == expected
    named = {"gpu": "mosaic_gpu" if target == HOPPER else "triton", "tpu": "mosaic_tpu"}
    if target in (HOPPER, AMPERE) and dtype != "float32":
        assert dispatch.choose(problem, "pallas") == named[target.platform]


def test_eight_devices_are_not_alone_but_inside_shard_map():
    assert dispatch.current_target().platform == "cpu"
    assert not dispatch.is_alone()
    mesh = jax.make_mesh((8,), ("d",))
    seen = []

    def inside(x):
        seen.append(dispatch.is_alone())
        return x

    x = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("d")))
    jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d")))(x)
    assert seen == [True]
