"""Runs a case and compares it with one device."""

import dataclasses
import math
import re
import traceback
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc
from tests.fuzz import program
from tests.fuzz.draw import Case

_PACKAGE = str(Path(mc.__file__).parent)
#: Relative Frobenius error that two ways to compute the same update may differ by. In 16 bits it is
#: the largest distance from the polynomial in float64 that docs/performance.md gives, rounded up.
_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-1, "bfloat16": 3e-1}
#: What ill-conditioned matrices may differ by in float32, from the same pages.
_ILL_CONDITIONED = 5e-3


class FaultError(AssertionError):
    """Something does not hold: "kind: what", and where, if it is a leaf, behind ", at "."""


def run(case: Case) -> str:
    """Returns what is wrong: "" where nothing is, "refused: why" where the package refuses."""
    before = jax.config.values["jax_traceback_filtering"]
    # Filtered, an error inside of JAX would seem to come from the package's frame.
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with jax.enable_x64(case.x64):
            _check(case)
    except FaultError as fault:
        return str(fault)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        meant = isinstance(error, ValueError | TypeError | NotImplementedError)
        raised = frame.filename.startswith(_PACKAGE) and "raise" in (frame.line or "")
        kind = "refused" if meant and raised else "crash"
        return f"{kind}: {type(error).__name__} in {frame.name}: {error}"
    finally:
        jax.config.update("jax_traceback_filtering", before)
    return ""


def signature(found: str) -> str:
    """The same for faults that look alike: numbers and paths are left out."""
    first = found.partition("\n")[0].partition(", at ")[0]
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", first[:110])


def _check(case: Case) -> None:
    drawn = program.draw_arrays(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected, nudged = program.one_device(case, drawn, _nudged(drawn, case))
        actual = program.as_asked(case, drawn)
    for warning in caught:
        if not (case.hidden and "Pass param_shardings=" in str(warning.message)):
            raise FaultError(f"warning: {warning.category.__name__}: {warning.message}")
    try:
        _check_promises(actual, case)
    except FaultError as fault:
        kind = str(fault).partition(":")[0]
        if kind not in ("sharding", "traces") or not _fails_too(case, drawn, kind):
            raise
    _check_values(actual.result, expected, nudged, case)


def _fails_too(case: Case, drawn: list[Any], kind: str) -> bool:
    """Whether an elementwise transformation of Optax breaks the same promise in this program.

    JAX itself traces again where a scalar of the state comes without a mesh and returns with one,
    and loses shardings on meshes of mixed axis types.
    """
    try:
        tx = optax.with_extra_args_support(optax.adam(0.1))
        run = program.as_asked(case, drawn, tx)
        _check_promises(run, dataclasses.replace(case, factory="optax"))
    except FaultError as other:
        return str(other).startswith(kind)
    except Exception:
        return True
    return False


def _check_promises(run: program.Run, case: Case) -> None:
    """The state is like `init`'s, updates are sharded as the parameters, one trace is enough."""
    updates, _, state = run.result
    _check_alike(state, run.initial, "state", not case.hidden and case.init != "jit")
    # A wider mu_dtype widens the updates of `optax.adamw`, too; the sharding of clipped leaves is
    # the compiler's choice where axes are Auto.
    free = {leaf.path for leaf in case.leaves if not leaf.dims and case.options["mu_dtype"]}
    if case.maxima is not None and case.auto:
        clipped = tuple(f"{case.maxima[0]}/{role}/" for role in ("query", "key"))
        free |= {leaf.path for leaf in case.leaves if leaf.path.startswith(clipped)}
    _check_alike(updates, run.params, "updates", not case.hidden, free)
    if case.mode != "eager" and run.traces > 1:
        raise FaultError(f"traces: {run.traces} over two calls")


def _check_alike(
    tree: Any, like: Any, what: str, check_sharding: bool, free: Collection[str] = ()
) -> None:
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise FaultError(f"structure: {what} changed it")
    for (path, a), (_, e) in zip(_paths(tree), _paths(like), strict=True):
        if path in free:
            continue
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            detail = f"{what} {a.shape} {a.dtype}, expected {e.shape} {e.dtype}"
            raise FaultError(f"dtype: {detail}, at {path}")
        # A number that no device was chosen for, such as Adam's count, has no sharding of its own.
        placed = check_sharding and getattr(e, "committed", True)
        if placed and not a.sharding.is_equivalent_to(e.sharding, a.ndim):
            detail = f"{what} {a.sharding}, expected {e.sharding}"
            raise FaultError(f"sharding: {detail}, at {path}")


def _check_values(actual: Any, expected: Any, nudged: Any, case: Case) -> None:
    """Updates and state are those of one device, or as close as those of a nudged gradient."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise FaultError("structure: updates or state have another than on one device")
    for (path, a), e, n in zip(
        _paths(actual), *map(jax.tree.leaves, (expected, nudged)), strict=True
    ):
        is_count = jnp.issubdtype(e.dtype, jnp.integer)
        bound = (
            0.0
            if is_count
            else max(_TOLERANCE[_narrowest(case)], min(_distance(n, e), _ILL_CONDITIONED))
        )
        distance = _distance(a, e)
        if not distance <= bound:
            raise FaultError(f"value: one device differs by {distance:.2g}, at {path}")


def _nudged(drawn: list[Any], case: Case) -> list[Any]:
    """Gradients with another rounding of every entry: what that changes, other devices may too."""
    rng = np.random.default_rng(case.seed)
    eps = float(jnp.finfo(_narrowest(case)).eps)
    factor = lambda x: jnp.asarray(1 + 8 * eps * rng.choice((-1, 1), x.shape), x.dtype)  # noqa: E731
    return [drawn[0], *jax.tree.map(lambda x: x * factor(x), drawn[1:])]


def _narrowest(case: Case) -> str:
    """The narrowest dtype that anything is rounded to."""
    names = [leaf.dtype for leaf in case.leaves]
    names += [name for name in (case.options["ns_dtype"], case.options["mu_dtype"]) if name]
    return max(names, key=_TOLERANCE.__getitem__)


def _distance(a: Any, e: Any) -> float:
    """Relative Frobenius error; NaN and infinity must be in the same places."""
    a, e = (np.asarray(x).astype(np.float64) for x in (a, e))
    if a.shape != e.shape or not np.array_equal(np.isfinite(a), np.isfinite(e)):
        return math.inf
    a, e = (np.where(np.isfinite(x), x, 0.0) for x in (a, e))
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30))


def _paths(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree.leaves_with_path(tree)
    ]
