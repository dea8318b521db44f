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
from muonclip_jax.newton_schulz import plan_polar
from muonclip_jax.newton_schulz.coefficients import COEFFICIENT_SETS, DEFAULT_SET, guard_rows
from tests.helpers import equations, normal_tree, polynomial_of_singular_values, update

# Wide matrices for which "auto" takes the Gram form, square ones for which it does not.
SHAPES = {"up": (12, 48), "down": (48, 12), "gate": (12, 48), "query": (16, 16), "key": (16, 16)}
PARAMS = normal_tree(SHAPES, 0)
FUNCTIONS: dict[str, Any] = {
    "scale_by_muon": mc.scale_by_muon,
    "muon": lambda **arguments: mc.muon(1e-3, **arguments),
    "muonclip": lambda **arguments: mc.muonclip(1e-3, qk_clip_threshold=None, **arguments),
    "orthogonalize": lambda **arguments: lambda x: mc.orthogonalize(x, **arguments),
}


def assert_polynomial(updates: Any, coefficients: str, platform: str) -> None:
    """The polynomial that the plan names, in float64, after the set's own first division."""
    source = COEFFICIENT_SETS[coefficients]
    for name, g in PARAMS.items():
        tall = g.shape[0] > g.shape[1]
        x = np.asarray(g.T if tall else g, np.float64)
        plan = plan_polar(coefficients, platform=platform).resolve(x.shape, "float32")
        power = {"frobenius": 2, "schatten8": 8}[source.preconditioning]
        exact = polynomial_of_singular_values(
            x,
            list(guard_rows(source.rows, plan.dtype)),
            scale=float(np.linalg.norm(np.linalg.svd(x, compute_uv=False), ord=power)),
        )
        # Relative Frobenius distance on Gaussian matrices, by what the products compute in.
        bound = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}[plan.dtype]
        got = np.asarray(updates[name].T if tall else updates[name], np.float64)
        assert np.linalg.norm(got - exact) < bound * np.linalg.norm(exact), name
        assert updates[name].dtype == jnp.float32


@pytest.mark.parametrize("coefficients", ["minimax4", "keller_jordan"])
@pytest.mark.parametrize(
    ("platform", "dtype", "ndim"),
    # An accelerator works on all matrices of a shape at once.
    [("cpu", "float32", 2), ("gpu", "float16", 3), ("tpu", "bfloat16", 3)],
)
def test_one_device_of_every_platform(platform: str, dtype: str, ndim: int, coefficients: str):
    tx = mc.scale_by_muon(coefficients, beta=0.0, nesterov=False, platform=platform)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert_polynomial(updates, coefficients, platform)
    products = {
        (equation.invars[0].aval.dtype.name, equation.invars[0].aval.ndim)
        for equation in equations(jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS))
        if equation.primitive.name == "dot_general"
    }
    assert products == {(dtype, ndim)}


@pytest.mark.parametrize("platforms", [["cuda"], ["tpu"], ["cpu", "cuda"]])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_for_here_is_not_exported_for_elsewhere(name: str, platforms: list[str]) -> None:
    def exported(**arguments: Any) -> export.Exported:
        function = FUNCTIONS[name](**arguments)
        if name != "orthogonalize":
            tx, state = function, function.init({"w": PARAMS["up"]})
            function = lambda x: update(tx, {"w": x}, state, {"w": x})[0]  # noqa: E731
        return export.export(jax.jit(function), platforms=platforms)(PARAMS["up"])

    with pytest.raises(NotImplementedError, match=r"planned for platform 'cpu'.*Pass platform="):
        exported()
    # Told so, it is the same program everywhere; what runs here gives what it gives here.
    assert "f16" not in exported(platform="cpu").mlir_module()
    assert "f16" in exported(platform="cuda").mlir_module()
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
