"""The platform is decided once: the paths of a GPU and a TPU run here, and no other one is lowered.

Results are compared with the float64 polynomial on singular values.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import muonclip_jax as mc
from muonclip_jax.__main__ import parser
from muonclip_jax.newton_schulz import COEFFICIENT_SETS, DEFAULT_SET, plan_polar
from muonclip_jax.newton_schulz.stability import guard_rows
from tests.helpers import equations, polynomial_of_singular_values, update

RNG = np.random.default_rng(0)
# Wide matrices for which "auto" takes the Gram form, square ones for which it does not.
SHAPES = {"up": (12, 48), "down": (48, 12), "gate": (12, 48), "query": (16, 16), "key": (16, 16)}
GRADS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
PARAMS = {name: jnp.asarray(g) for name, g in GRADS.items()}
OPTIMIZERS: dict[str, Any] = {
    "scale_by_muon": mc.scale_by_muon,
    "muon": lambda **arguments: mc.muon(1e-3, **arguments),
    "muonclip": lambda **arguments: mc.muonclip(1e-3, qk_clip_threshold=None, **arguments),
}


def expected(x: np.ndarray, coefficients: str, platform: str) -> np.ndarray:
    """The polynomial that the plan names, in float64, after the set's own first division."""
    source = COEFFICIENT_SETS[coefficients]
    resolved = plan_polar(coefficients, platform=platform).resolve(x.shape, x.dtype)
    power = {"frobenius": 2, "schatten8": 8}[source.preconditioning]
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    return polynomial_of_singular_values(
        x,
        list(guard_rows(source.rows, resolved.dtype)),
        scale=float(np.linalg.norm(values, ord=power)),
    )


# Relative Frobenius distance on Gaussian matrices, by what the products compute in.
BOUNDS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}


@pytest.mark.parametrize("coefficients", ["minimax4", "keller_jordan"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_one_device_of_every_platform(platform: str, coefficients: str) -> None:
    tx = mc.scale_by_muon(coefficients, beta=0.0, nesterov=False, platform=platform)
    run = jax.jit(tx.update)
    updates, _ = run(PARAMS, tx.init(PARAMS), PARAMS)
    plan = plan_polar(coefficients, platform=platform)
    for name, g in GRADS.items():
        wide = g if g.shape[0] <= g.shape[1] else g.T
        exact = expected(wide, coefficients, platform)
        got = np.asarray(updates[name], np.float64)
        got = got if g.shape[0] <= g.shape[1] else got.T
        bound = BOUNDS[plan.resolve(g.shape, "float32").dtype]
        assert np.linalg.norm(got - exact) < bound * np.linalg.norm(exact), name
        assert updates[name].dtype == jnp.float32
    products = [
        equation.invars[0].aval
        for equation in equations(jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS))
        if equation.primitive.name == "dot_general"
    ]
    dtypes = {"cpu": {"float32"}, "gpu": {"float16"}, "tpu": {"bfloat16"}}
    assert {product.dtype.name for product in products} == dtypes[platform]
    # An accelerator works on all matrices of a shape at once.
    assert {product.ndim for product in products} == ({2} if platform == "cpu" else {3})


@pytest.mark.parametrize("platforms", [["cuda"], ["tpu"], ["cpu", "cuda"]])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "orthogonalize"])
def test_a_program_for_here_is_not_exported_for_elsewhere(name: str, platforms: list[str]) -> None:
    def exported(**arguments: Any) -> export.Exported:
        function: Any = lambda x: mc.orthogonalize(x, **arguments)  # noqa: E731
        if name != "orthogonalize":
            tx = OPTIMIZERS[name](**arguments)
            state = tx.init({"w": PARAMS["up"]})
            function = lambda x: update(tx, {"w": x}, state, {"w": x})[0]  # noqa: E731
        return export.export(jax.jit(function), platforms=platforms)(PARAMS["up"])

    with pytest.raises(NotImplementedError, match=r"planned for platform 'cpu'.*Pass platform="):
        exported()
    # Told so, it is the same program everywhere; what runs here gives what it gives here.
    assert "f16" not in exported(platform="cpu").mlir_module()
    assert "f16" in exported(platform="gpu").mlir_module()
    if "cpu" in platforms:
        got = jax.tree.leaves(exported(platform="cpu").call(PARAMS["up"]))[0]
        assert np.isfinite(np.asarray(got)).all()


def test_the_exact_polar_factor_is_the_same_everywhere() -> None:
    run = jax.jit(lambda x: mc.orthogonalize(x, ns_method="svd"))
    export.export(run, platforms=["cuda"])(PARAMS["up"])


def test_an_explicit_mesh_knows_no_platform_that_the_caller_does_not_name() -> None:
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    for platform in (None, "gpu"):
        tx = mc.scale_by_muon(platform=platform)
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        assert ("xf16>" in lowered) == (platform == "gpu")


@pytest.mark.parametrize("name", [*OPTIMIZERS, "orthogonalize", "describe_cost"])
def test_an_unknown_platform_is_refused(name: str) -> None:
    functions: dict[str, Any] = {
        "orthogonalize": lambda **arguments: mc.orthogonalize(PARAMS["up"], **arguments),
        "describe_cost": lambda **arguments: mc.describe_cost(PARAMS, **arguments),
        **OPTIMIZERS,
    }
    with pytest.raises(ValueError, match=r"platform='gpus' is not known. Pass one of 'cpu', 'gpu'"):
        functions[name](platform="gpus")
    functions[name](platform="cuda")


def test_one_default_for_all() -> None:
    names = ("ns_coeffs", "ns_method", "ns_dtype", "eps", "ns_steps", "preconditioning")
    plan = inspect.signature(mc.orthogonalize).parameters
    for function in (mc.scale_by_muon, mc.muonclip, mc.MuonClipConfig, mc.describe_cost):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in names:
                assert parameter.default == plan[name].default, (function, name)
    options = parser().parse_args(["describe", "checkpoint"])
    for name in ("ns_coeffs", "ns_method", "ns_dtype", "ns_steps"):
        assert getattr(options, name) == plan[name].default
    assert plan["ns_coeffs"].default == DEFAULT_SET
    # Optax's own.
    assert inspect.signature(mc.muon).parameters["ns_coeffs"].default == "keller_jordan"


def test_a_step_of_the_optimising_compiler() -> None:
    # The other programs of the suite are compiled without optimisation.
    tx = mc.muonclip(1.0, qk_clip_threshold=None, weight_decay=0.0, beta=0.0, nesterov=False)
    state = tx.init(PARAMS)
    compiled = (
        jax.jit(tx.update)
        .lower(PARAMS, state, PARAMS)
        .compile(
            {"xla_backend_optimization_level": "3", "xla_llvm_disable_expensive_passes": False}
        )
    )
    updates, _ = compiled(PARAMS, state, PARAMS)
    for name, g in GRADS.items():
        wide = g if g.shape[0] <= g.shape[1] else g.T
        exact = -0.2 * max(g.shape) ** 0.5 * expected(wide, DEFAULT_SET, "cpu")
        exact = exact if g.shape[0] <= g.shape[1] else exact.T
        got = np.asarray(updates[name], np.float64)
        assert np.linalg.norm(got - exact) < BOUNDS["float32"] * np.linalg.norm(exact), name
