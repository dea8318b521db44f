"""Runs a case: executes its program, then compares what the two halves of it have left."""

import dataclasses
import linecache
import math
import re
import traceback
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import muonclip_jax as mc
from tests.fuzz import programs, reference
from tests.fuzz.cases import Case

_PACKAGE = str(Path(mc.__file__).parent)

#: Relative Frobenius error that two ways to compute the same update may differ by. In 16 bits it is
#: the largest distance from the polynomial in float64 over the matrices of docs/quality.md.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 7e-2, "bfloat16": 2e-1}
#: A derivative has the slopes of all steps in it once more.
_GRADIENT_FACTOR = 30.0
#: By how many units in the last place the normalised singular values may be off. In float32 the
#: library scales rows that are steep beyond 1 by 2e-6, which is 17 units.
_ROUNDINGS = 32


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


class _FaultError(AssertionError):
    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.outcome = Outcome("failed", kind, detail)


def run(case: Case) -> Outcome:
    """Runs a case on the devices that there are."""
    before = jax.config.jax_traceback_filtering
    # Filtered, an error inside of JAX would seem to come from the package's frame.
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with jax.enable_x64(case.x64):
            _check(case)
    except _FaultError as fault:
        return fault.outcome
    except Exception as error:
        if _is_refusal(error):
            return Outcome("refused", type(error).__name__, str(error))
        where = _innermost(error)
        return Outcome("failed", "crash", f"{type(error).__name__} in {where}: {error}")
    finally:
        jax.config.update("jax_traceback_filtering", before)
    return Outcome("ok")


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    yield from traceback.extract_tb(error.__traceback__, limit=None)


def _is_refusal(error: BaseException) -> bool:
    """Whether the last frame is a `raise` of the package, with a message."""
    *_, last = _frames(error)
    inside = last.filename.startswith(_PACKAGE)
    line = linecache.getline(last.filename, last.lineno or 0)
    allowed = isinstance(error, ValueError | TypeError | NotImplementedError)
    return inside and "raise" in line and allowed and len(str(error)) > 20


def _innermost(error: BaseException) -> str:
    inside = [frame for frame in _frames(error) if frame.filename.startswith(_PACKAGE)]
    return inside[-1].name if inside else "the program"


def _execute(source: str, space: dict[str, Any]) -> list[str]:
    """Executes a piece of the program and returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(source, "<case>", "exec"), space)
    return [f"{warning.category.__name__}: {warning.message}" for warning in caught]


def _check(case: Case) -> None:
    space: dict[str, Any] = {"traces": []}
    exec(programs.IMPORTS, space)
    _execute(programs.setup(case), space)
    arrays = [_by_path(space[name]) for name in ("params", "first", "second")]
    said = _execute(programs.one_device(case), space)
    space["traces"].clear()
    said += _execute(programs.configured(case), space)
    unexpected = [text for text in said if not _is_expected(text, case)]
    if unexpected:
        raise _FaultError("warning", unexpected[0])
    actual, expected = space["actual"], space["expected"]
    if case.mode == "pmap":
        _check_replicas(actual)
    _check_forms(actual, expected, case)
    try:
        _check_promises(space, case)
    except _FaultError as fault:
        if fault.outcome.kind not in ("sharding", "traces") or not _fails_too(case, fault):
            raise
    wanted = _wanted(case, arrays)
    _check_values(actual, expected, case, wanted)
    _check_reference(actual, case, wanted)


def _is_expected(text: str, case: Case) -> bool:
    if "Pass param_shardings=" in text:
        return case.hidden
    return False


def _paths(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree.leaves_with_path(tree)
    ]


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x).astype(np.float64) for path, x in _paths(tree)}


def _check_replicas(tree: Any) -> None:
    for path, x in _paths(tree):
        values = np.asarray(x)
        if not all(np.array_equal(values[0], one, equal_nan=True) for one in values):
            raise _FaultError("value", f"replicas differ, at {path}")


def _check_forms(actual: Any, expected: Any, case: Case) -> None:
    """Structure, shapes and dtypes are those of one device."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise _FaultError("structure", "updates or state have another structure than on one device")
    for (path, a), (_, e) in zip(_paths(actual), _paths(expected), strict=True):
        shape = a.shape[1:] if case.mode == "pmap" else a.shape
        if (shape, a.dtype) != (e.shape, e.dtype):
            detail = f"{shape} {a.dtype}, on one device {e.shape} {e.dtype}, at {path}"
            raise _FaultError("dtype", detail)


def _fails_too(case: Case, fault: _FaultError) -> bool:
    """Whether an elementwise transformation of Optax breaks the same promise in this program.

    JAX itself traces again where a scalar of the state comes without a mesh and returns with one,
    and loses shardings on meshes of mixed axis types.
    """
    space: dict[str, Any] = {"traces": []}
    exec(programs.IMPORTS, space)
    _execute(programs.setup(case), space)
    tx = "optax.with_extra_args_support(optax.adam(0.1))"
    try:
        _execute(programs.configured(case, tx), space)
        _check_promises(space, dataclasses.replace(case, factory="optax"))
    except _FaultError as other:
        return other.outcome.kind == fault.outcome.kind
    except Exception:
        return True
    return False


def _check_promises(space: dict[str, Any], case: Case) -> None:
    """The state is like `init`'s, the updates lie as the parameters do, one trace does."""
    if not case.gradient and case.factory != "apply_qk_clip":
        updates, _, state = space["actual"]
        initial, params = space["initial"], space["params"]
        if "abstract" in space:
            _check_alike(space["abstract"], initial, "init of shapes", check_sharding=False)
        sharded = not case.hidden and case.mode != "pmap" and not _left_to_the_compiler(case)
        _check_alike(state, initial, "state", sharded and case.init != "jit")
        # A wider mu_dtype widens the updates of `optax.adamw`, too.
        adam = {leaf.path for leaf in case.leaves if not leaf.dims and case.option["mu_dtype"]}
        _check_alike(updates, params, "updates", sharded, adam)
    if case.mode != "eager" and len(space["traces"]) > 1:
        raise _FaultError("traces", f"{len(space['traces'])} traces over two calls")


def _left_to_the_compiler(case: Case) -> bool:
    """Whether it chooses the sharding of clipped leaves: by the maxima, where axes are Auto."""
    auto = any(kind == "Auto" and size > 1 for _, size, kind in case.mesh)
    return bool(case.maxima_spec) and auto and case.mode == "jit"


def _check_alike(
    tree: Any, like: Any, what: str, check_sharding: bool, but: Collection[str] = ()
) -> None:
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise _FaultError("structure", f"{what} changed structure")
    for (path, a), (_, e) in zip(_paths(tree), _paths(like), strict=True):
        if path in but:
            continue
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            detail = f"{what} {a.shape} {a.dtype}, expected {e.shape} {e.dtype}, at {path}"
            raise _FaultError("dtype", detail)
        # A number that no device was chosen for, such as Adam's count, has no sharding of its own.
        free = not getattr(e, "committed", True)
        if check_sharding and not free and not a.sharding.is_equivalent_to(e.sharding, a.ndim):
            detail = f"{what} {a.sharding}, expected {e.sharding}, at {path}"
            raise _FaultError("sharding", detail)


def _narrowest(case: Case) -> str:
    """The narrowest dtype that anything is rounded to."""
    names = [leaf.dtype for leaf in case.leaves]
    options = case.option
    names += [name for name in (options.get("ns_dtype"), options.get("mu_dtype")) if name]
    return max(names, key=TOLERANCE.__getitem__)


def tolerance(case: Case) -> float:
    """The bound of the narrowest dtype."""
    return TOLERANCE[_narrowest(case)] * (_GRADIENT_FACTOR if case.gradient else 1)


def _distance(a: Any, e: Any) -> float:
    """Relative Frobenius error; NaN and infinity must be in the same places."""
    a, e = (np.asarray(x).astype(np.float64) for x in (a, e))
    if not np.array_equal(np.isfinite(a), np.isfinite(e)):
        return math.inf
    a, e = (np.where(np.isfinite(x), x, 0.0) for x in (a, e))
    return float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30))


def _check_values(actual: Any, expected: Any, case: Case, wanted: "_Wanted") -> None:
    what = "gradients differ" if case.gradient else "results differ"
    for (path, a), (_, e) in zip(_paths(actual), _paths(expected), strict=True):
        a = a[0] if case.mode == "pmap" else a
        if jnp.issubdtype(e.dtype, jnp.integer):
            if not np.array_equal(a, e):
                raise _FaultError("value", f"count {a}, on one device {e}, at {path}")
        elif not _distance(a, e) <= wanted.get(path, (None, tolerance(case)))[1]:
            raise _FaultError(
                "value", f"{what} from one device by {_distance(a, e):.2g}, at {path}"
            )


#: Path, with the number of the step before it -> the result in float64 and a bound.
_Wanted = dict[str, tuple[np.ndarray, float]]


def _wanted(case: Case, arrays: list[dict[str, Any]]) -> _Wanted:
    """What NumPy says; empty where a gradient is asked for."""
    bound = tolerance(case)
    if case.gradient:
        return {}
    if case.factory == "apply_qk_clip":
        return {f"0/{path}": (x, bound) for path, x in reference.clipped(case, arrays[0]).items()}
    nudge = _ROUNDINGS * float(jnp.finfo(_narrowest(case)).eps)
    steps = reference.two_updates(case, *arrays)
    nudged = steps if nudge > 1e-4 else reference.two_updates(case, *arrays, nudge)
    return {
        f"{number}/{path}": (x, max(bound, _distance(nudged[number][path], x)))
        for number, step in enumerate(steps)
        for path, x in step.items()
    }


def _check_reference(actual: Any, case: Case, wanted: _Wanted) -> None:
    got = dict(_paths(actual))
    for path, (expected, bound) in wanted.items():
        a = got[path][0] if case.mode == "pmap" else got[path]
        if not _distance(a, expected) <= bound:
            distance = _distance(a, expected)
            raise _FaultError("value", f"NumPy differs by {distance:.2g}, at {path}")


def simplified(case: Case, outcome: Outcome) -> Case:
    """Takes away leaves, options and what else is not needed for the same thing to fail."""
    changed = True
    while changed:
        changed = False
        for simpler in _simpler(case):
            if run(simpler).signature == outcome.signature:
                case, changed = simpler, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    replace = dataclasses.replace
    for leaf in case.leaves:
        rest = tuple(other for other in case.leaves if other != leaf)
        needed = case.maxima is not None and leaf.path.startswith(f"{case.maxima[0]}/")
        if rest and not needed:
            yield replace(case, leaves=rest)
    if case.factory != "apply_qk_clip" and case.maxima is not None:
        kept = tuple(o for o in case.options if not o[0].startswith("qk_clip"))
        yield replace(
            case, maxima=None, maxima_spec=None, options=(*kept, ("qk_clip_threshold", None))
        )
    if case.distribution:
        yield replace(case, distribution=())
    if len(case.distribution) > 1:
        for number in range(len(case.distribution)):
            yield replace(case, distribution=case.distribution[number : number + 1])
    for name, value in _PLAIN_OPTIONS.items():
        if name in case.option and case.option[name] != value:
            options = tuple((key, value if key == name else old) for key, old in case.options)
            yield replace(case, options=options)
    for name, value in _PLAIN_FIELDS.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    for number, leaf in enumerate(case.leaves):
        if leaf.spec:
            bare = replace(leaf, spec=())
            yield replace(case, leaves=(*case.leaves[:number], bare, *case.leaves[number + 1 :]))


_PLAIN_OPTIONS: dict[str, Any] = {
    "ns_coeffs": "keller_jordan",
    "ns_steps": 1,
    "preconditioning": None,
    "ns_method": "standard",
    "ns_dtype": None,
    "beta": 0.95,
    "nesterov": True,
    "mu_dtype": None,
    "adaptive": False,
    "bias_correction": False,
    "relative_eps": True,
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "weight_decay_mask": None,
}
_PLAIN_FIELDS: dict[str, Any] = {
    "gradient": False,
    "x64": False,
    "set_mesh": False,
    "given": False,
    "init": "eager",
    "maxima_spec": None,
}
