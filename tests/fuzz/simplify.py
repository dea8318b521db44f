"""A smaller case in which the same thing fails."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from tests.fuzz.cases import Case
from tests.fuzz.checks import Outcome
from tests.fuzz.run import run


def simplified(case: Case, outcome: Outcome, seconds: float = 30.0) -> Case:
    """Takes away leaves, options and what else is not needed for the same thing to fail.

    Args:
        case: The case.
        outcome: What came of it.
        seconds: Processor time that this may take.
    """
    changed, end = True, time.process_time() + seconds
    while changed:
        changed = False
        for simpler in _simpler(case):
            if time.process_time() > end:
                return case
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
