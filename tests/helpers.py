"""Oracles, case tables and tolerances that the tests share."""

import inspect
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

try:
    from jax.extend.core import jaxprs_in_params
except ImportError:  # JAX before 0.10
    from jax.core import jaxprs_in_params

#: Relative tolerance by dtype for one pass through the library; a looser one says why.
TOLERANCE = {
    "float64": 1e-12,
    "complex128": 1e-12,
    "float32": 1e-5,
    "complex64": 1e-5,
    "bfloat16": 2e-2,
    "float16": 4e-3,
}


def polynomial_of_singular_values(
    x: np.ndarray, rows: list[tuple[float, float, float]], scale: float = 1.0
) -> np.ndarray:
    """Applies the rows' odd quintics to the singular values of `x / scale`, in float64.

    Newton-Schulz in exact arithmetic is this function: it acts on singular values alone.
    """
    u, s, vh = np.linalg.svd(
        np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), full_matrices=False
    )
    s = s / scale
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def described_mesh(
    platform: str, sizes: tuple[int, ...] = (1,), names: tuple[str, ...] = ("device",)
) -> AbstractMesh:
    """A mesh of devices that are not here; H200s for "cuda".

    JAX 0.12 asks the mesh for which GPU a kernel is lowered, and where none says so it looks for a
    GPU. In 0.10.0 a described device has no platform.
    """
    fields = {"device_kind": "NVIDIA H200", "num_cores": None, "platform": "gpu"}
    known = inspect.signature(AbstractDevice).parameters
    device = AbstractDevice(**{name: fields[name] for name in fields if name in known})
    return AbstractMesh(
        sizes,
        names,
        axis_types=(AxisType.Auto,) * len(names),
        abstract_device=device if platform == "cuda" else None,
    )


def lowered(
    platform: str,
    function: Callable[..., Any],
    *arguments: Any,
    mesh: AbstractMesh | None = None,
) -> str:
    """What a function becomes on a platform ("tpu" or "cuda") that is not here, before compiling.

    A function with a `shard_map` needs its `mesh`, a described one, here as well.
    """
    with jax.sharding.use_abstract_mesh(mesh or described_mesh(platform)):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs inside it too, once for each use.

    The text of a jaxpr will not do to count by: JAX 0.12 prints what is used twice once.
    """
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


ROOT = Path(__file__).parents[1]
#: What runs once is not worth optimising; and one device, as users have.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def finished(
    *words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command on one CPU device, with the repository to import from; keeps its output."""
    own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, **(env or {})}
    return subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )


def update(tx: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Calls `tx.update`; the trees that come back are looked into, so they are typed as Any."""
    return tx.update(*args, **kwargs)


def normal_tree(shapes: Any, seed: int, dtype: Any = "float32") -> Any:
    """Normal numbers in a tree of shapes."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape)
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        return jnp.asarray(
            values + 1j * rng.standard_normal(shape) if is_complex else values, dtype
        )

    return jax.tree.map(normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE["float32"]) -> None:
    """Two trees of one structure, entry by entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), actual, expected
    )


def assert_equal(actual: Any, expected: Any) -> None:
    """Two trees of one structure, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
