"""What must hold of a case: forms, shardings, traces and values."""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import reference
from tests.fuzz.cases import Case

#: Relative Frobenius error that two ways to compute the same update may differ by. In 16 bits it is
#: the largest distance from the polynomial in float64 that docs/performance.md gives, rounded up.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-1, "bfloat16": 3e-1}
#: A derivative has the slopes of all steps in it once more.
_GRADIENT_TOLERANCE = {"float64": 1e-8, "float32": 3e-3, "float16": 0.2, "bfloat16": 0.4}
#: By how many units in the last place the normalised singular values may be off.
_ROUNDINGS = 8
#: What ill-conditioned matrices may differ by in float32, from the same pages.
_ILL_CONDITIONED = 5e-3


#: Path, with the number of the step before it -> the result in float64 and a bound.
_Wanted = dict[str, tuple[np.ndarray, float]]


#: A factor is as wide as the maxima: float64 in 64-bit mode, where a case draws them so.
_CLIP = {True: 1e-12, False: 1e-6}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        status: "ok", "refused" (by the package, with a message) or "failed".
        kind: What failed: "crash", "value", "dtype", "sharding", "structure", "traces", "warning".
        detail: The message, or what differs.
    """

    status: str
    kind: str = ""
    detail: str = ""

    @property
    def signature(self) -> str:
        """The same for faults that look alike: numbers and paths are left out."""
        first = self.detail.partition("\n")[0].partition(", at ")[0]
        text = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", first[:110])
        return f"{self.kind}: {text}"


class FaultError(AssertionError):
    """Something does not hold."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.outcome = Outcome("failed", kind, detail)


def _paths(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree.leaves_with_path(tree)
    ]


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves in float64."""
    return {path: np.asarray(x).astype(np.float64) for path, x in _paths(tree)}


def check_replicas(tree: Any) -> None:
    """All devices of a `pmap` have the same bits."""
    for path, x in _paths(tree):
        values = np.asarray(x)
        if not all(np.array_equal(values[0], one, equal_nan=True) for one in values):
            raise FaultError("value", f"replicas differ, at {path}")


def check_forms(actual: Any, expected: Any, case: Case) -> None:
    """Structure, shapes and dtypes are those of one device."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise FaultError("structure", "updates or state have another structure than on one device")
    for (path, a), (_, e) in zip(_paths(actual), _paths(expected), strict=True):
        shape = a.shape[1:] if case.mode == "pmap" else a.shape
        if (shape, a.dtype) != (e.shape, e.dtype):
            detail = f"{shape} {a.dtype}, on one device {e.shape} {e.dtype}, at {path}"
            raise FaultError("dtype", detail)


def check_promises(space: dict[str, Any], case: Case) -> None:
    """The state is like `init`'s, the updates lie as the parameters do, one trace does."""
    if not case.gradient and case.factory != "apply_qk_clip":
        updates, _, state = space["actual"]
        initial, params = space["initial"], space["params"]
        if "abstract" in space:
            _check_alike(space["abstract"], initial, "init of shapes", check_sharding=False)
        sharded = not case.hidden and case.mode != "pmap"
        _check_alike(state, initial, "state", sharded and case.init != "jit")
        # A wider mu_dtype widens the updates of `optax.adamw`, too.
        adam = {leaf.path for leaf in case.leaves if not leaf.dims and case.option["mu_dtype"]}
        _check_alike(updates, params, "updates", sharded, adam | _left_to_the_compiler(case))
    if case.mode != "eager" and len(space["traces"]) > 1:
        raise FaultError("traces", f"{len(space['traces'])} traces over two calls")


def _left_to_the_compiler(case: Case) -> set[str]:
    """The clipped leaves, whose sharding the compiler chooses where axes are Auto."""
    auto = any(
        kind == "Auto" and size > 1 and name not in case.manual for name, size, kind in case.mesh
    )
    return set(reference.clip_factors(case)) if auto and case.maxima is not None else set()


def _check_alike(
    tree: Any, like: Any, what: str, check_sharding: bool, but: Collection[str] = ()
) -> None:
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise FaultError("structure", f"{what} changed structure")
    for (path, a), (_, e) in zip(_paths(tree), _paths(like), strict=True):
        if path in but:
            continue
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            detail = f"{what} {a.shape} {a.dtype}, expected {e.shape} {e.dtype}, at {path}"
            raise FaultError("dtype", detail)
        # A number that no device was chosen for, such as Adam's count, has no sharding of its own.
        free = not getattr(e, "committed", True)
        if check_sharding and not free and not a.sharding.is_equivalent_to(e.sharding, a.ndim):
            detail = f"{what} {a.sharding}, expected {e.sharding}, at {path}"
            raise FaultError("sharding", detail)


def _narrowest(case: Case) -> str:
    """The narrowest dtype that anything is rounded to."""
    names = [leaf.dtype for leaf in case.leaves]
    options = case.option
    names += [name for name in (options.get("ns_dtype"), options.get("mu_dtype")) if name]
    return max(names, key=TOLERANCE.__getitem__)


def tolerance(case: Case) -> float:
    """The bound of the narrowest dtype."""
    return (_GRADIENT_TOLERANCE if case.gradient else TOLERANCE)[_narrowest(case)]


def _distance(a: Any, e: Any) -> float:
    """Relative Frobenius error; NaN and infinity must be in the same places."""
    a, e = (np.asarray(x).astype(np.float64) for x in (a, e))
    if not np.array_equal(np.isfinite(a), np.isfinite(e)):
        return math.inf
    a, e = (np.where(np.isfinite(x), x, 0.0) for x in (a, e))
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30))


def check_values(actual: Any, expected: Any, case: Case, wanted: _Wanted) -> None:
    """Compares with one device."""
    what = "gradients differ" if case.gradient else "results differ"
    # Adam's first step is the sign of the gradient: its derivative is rounding.
    signs = {f"0/{leaf.path}" for leaf in case.leaves if case.gradient and not leaf.dims}
    for (path, a), (_, e) in zip(_paths(actual), _paths(expected), strict=True):
        if path in signs:
            continue
        a = a[0] if case.mode == "pmap" else a
        if jnp.issubdtype(e.dtype, jnp.integer):
            if not np.array_equal(a, e):
                raise FaultError("value", f"count {a}, on one device {e}, at {path}")
        elif not _distance(a, e) <= wanted.get(path, (None, tolerance(case)))[1]:
            raise FaultError("value", f"{what} from one device by {_distance(a, e):.2g}, at {path}")


def expected_by_numpy(case: Case, arrays: list[dict[str, Any]]) -> _Wanted:
    """What NumPy says; empty where a gradient is asked for."""
    if case.gradient:
        return {}
    params, first, second = arrays
    bound, factors = tolerance(case), {}
    if case.maxima is not None:
        factors = dict.fromkeys(reference.clip_factors(case), _CLIP[case.x64])
    if case.factory == "apply_qk_clip":
        clipped = reference.clipped(case, params)
        return {f"0/{path}": (x, max(bound, _CLIP[case.x64])) for path, x in clipped.items()}
    nudge = _ROUNDINGS * float(jnp.finfo(_narrowest(case)).eps)
    steps = reference.two_updates(case, params, first, second)
    nudged = reference.two_updates(case, params, first, second, nudge) if nudge < 1e-4 else steps
    return {
        f"{number}/{path}": (x, max(bound, factors.get(path, 0.0), min(moved, _ILL_CONDITIONED)))
        for number, step in enumerate(steps)
        for path, x in step.items()
        for moved in [_distance(nudged[number][path], x)]
    }


def check_reference(actual: Any, case: Case, wanted: _Wanted) -> None:
    """Compares with NumPy."""
    got = dict(_paths(actual))
    for path, (expected, bound) in wanted.items():
        a = got[path][0] if case.mode == "pmap" else got[path]
        if not _distance(a, expected) <= bound:
            distance = _distance(a, expected)
            raise FaultError("value", f"NumPy differs by {distance:.2g}, at {path}")
