"""Runs a case: executes its program, then compares what the two halves of it have left."""

import dataclasses
import linecache
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import muonclip_jax as mc
from tests.fuzz import programs
from tests.fuzz.cases import Case
from tests.fuzz.checks import (
    FaultError,
    Outcome,
    by_path,
    check_forms,
    check_promises,
    check_reference,
    check_replicas,
    check_values,
    expected_by_numpy,
)

_PACKAGE = str(Path(mc.__file__).parent)


def run(case: Case) -> Outcome:
    """Runs a case on the devices that there are."""
    before = jax.config.values["jax_traceback_filtering"]
    # Filtered, an error inside of JAX would seem to come from the package's frame.
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with jax.enable_x64(case.x64):
            _check(case)
    except FaultError as fault:
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
    arrays = [by_path(space[name]) for name in ("params", "first", "second")]
    said = _execute(programs.one_device(case), space)
    space["traces"].clear()
    said += _execute(programs.configured(case), space)
    unexpected = [text for text in said if not _is_expected(text, case)]
    if unexpected:
        raise FaultError("warning", unexpected[0])
    actual, expected = space["actual"], space["expected"]
    if case.mode == "pmap":
        check_replicas(actual)
    check_forms(actual, expected, case)
    try:
        check_promises(space, case)
    except FaultError as fault:
        if fault.outcome.kind not in ("sharding", "traces") or not _fails_too(case, fault):
            raise
    wanted = expected_by_numpy(case, arrays)
    check_values(actual, expected, case, wanted)
    check_reference(actual, case, wanted)


def _is_expected(text: str, case: Case) -> bool:
    if "Pass param_shardings=" in text:
        return case.hidden
    return False


def _fails_too(case: Case, fault: FaultError) -> bool:
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
        check_promises(space, dataclasses.replace(case, factory="optax"))
    except FaultError as other:
        return other.outcome.kind == fault.outcome.kind
    except Exception:
        return True
    return False
