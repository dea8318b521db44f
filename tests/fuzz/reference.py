"""Muon, its shape scale, decay, AdamW and the clip in float64 NumPy, after the papers.

Nothing of the library is used: momentum and Nesterov lookahead (Jordan et al. 2024), the odd
quintic on the singular values of the direction, the shape scale (Liu et al. 2025, Lemma 1),
decoupled decay (Loshchilov and Hutter 2019) and QK-Clip (Kimi K2, Algorithm 1).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.fuzz.cases import Case, Leaf

_KELLER_JORDAN = (3.4445, -4.7750, 2.0315)
#: Rows as the sources print them, and the row of further steps.
ROWS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "keller_jordan": (_KELLER_JORDAN,) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "turbo": (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
    "minimax4": (
        (8.383673612923165, -24.765905857974534, 18.357081892887596),
        (4.04342043370043, -3.011404993841536, 0.569512150319183),
        (3.505570617243893, -2.6266538356181015, 0.5257194048203224),
        (2.490115939444256, -1.8342750827526721, 0.43683470689542514),
    ),
}
_PRECONDITIONING = {"turbo": "aol", "minimax4": "schatten8"}


def two_updates(
    case: Case, params: dict[str, Any], first: Any, second: Any, nudge: float = 0.0
) -> list[dict[str, Any]]:
    """Returns the updates of two steps by path, without the leaves of `muon` that NAdamW trains.

    Args:
        case: The case.
        params: Parameters by path, float64.
        first: Gradients of the first step, by path.
        second: Gradients of the second step.
        nudge: Change of the normalised singular values. What it does to the result is what rounding
            may do: the odd quintics are steep, at the end of their interval above all, where
            matrices of rank one lie.
    """
    state = {path: [np.zeros_like(x), np.zeros_like(x)] for path, x in params.items()}
    params, results = dict(params), []
    for number, gradients in enumerate((first, second)):
        updates: dict[str, Any] = {}
        for leaf in case.leaves:
            arguments = (leaf, params[leaf.path], gradients[leaf.path], state[leaf.path], number)
            if leaf.dims is not None:
                updates[leaf.path] = _muon(case, *arguments, nudge)
            elif case.factory == "muonclip":
                updates[leaf.path] = _adamw(case, *arguments)
        if case.maxima is not None:
            for path, factor in clip_factors(case).items():
                p, u = params[path], updates[path]
                updates[path] = np.where(factor != 1, factor * (p + u) - p, u)
        results.append(updates)
        params = {path: x + updates.get(path, 0.0) for path, x in params.items()}
    return results


def clipped(case: Case, params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters after the clip alone."""
    factors = clip_factors(case)
    return {path: x * factors.get(path, 1.0) for path, x in params.items()}


def _rate(case: Case, number: int) -> float:
    value = case.option["learning_rate"]
    # Numbers that float32 has, as Optax computes schedules in it.
    return value if isinstance(value, float) else 0.125 - 0.03125 * number


def _decays(case: Case, leaf: Leaf) -> bool:
    match case.option["weight_decay_mask"]:
        case None:
            # By default muonclip leaves out gains and biases, muon nothing.
            return leaf.dims is not None or case.factory == "muon"
        case _:
            return len(leaf.shape) > 1


def _muon(
    case: Case,
    leaf: Leaf,
    p: np.ndarray,
    g: np.ndarray,
    state: list[np.ndarray],
    number: int,
    nudge: float,
) -> np.ndarray:
    options, beta = case.option, case.option["beta"]
    m = state[0] = beta * state[0] + (1 - beta) * g
    corrects = options.get("bias_correction", case.factory == "muon")

    def corrected(x: np.ndarray, steps: int) -> np.ndarray:
        return x / (1 - beta**steps) if corrects else x

    u = corrected(m, number + 1)
    if options["nesterov"]:
        u = beta * corrected(m, number + 2) + (1 - beta) * corrected(g, number + 1)
    result = np.zeros_like(u)
    for place, shape in _matrices(leaf):
        result[place] = _polar(case, u[place].reshape(shape), nudge).reshape(u[place].shape)
    if options.get("adaptive"):
        result = np.sum(u * result) * result
    if case.factory == "scale_by_muon":
        return result
    for place, shape in _matrices(leaf):
        result[place] *= _scale(options["consistent_rms"], *shape)
    decay = options["weight_decay"] * _decays(case, leaf)
    return -_rate(case, number) * (result + decay * p)


def _scale(rms: float | None, fan_in: int, fan_out: int) -> float:
    if rms is None:
        return math.sqrt(max(1, fan_out / fan_in))
    return rms * math.sqrt(max(fan_in, fan_out))


def _matrices(leaf: Leaf) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Where the matrices of a leaf are, and their shapes as (inputs, outputs)."""
    assert leaf.dims is not None
    rows, columns = (math.prod(leaf.shape[axis] for axis in axes) for axes in leaf.dims)
    if leaf.split is None:
        # In every tree of the fuzzer inputs are before outputs and dimensions that count are first.
        for index in np.ndindex(*(leaf.shape[axis] for axis in leaf.batch)):
            yield index, (rows, columns)
        return
    axis, sizes, view, along = leaf.split
    assert axis == 1
    grid = (sum(sizes),) if view is None else view
    where = np.indices(grid)[along].reshape(-1)
    start = 0
    for size in sizes:
        chosen = np.flatnonzero((where >= start) & (where < start + size))
        yield (slice(None), chosen), (rows, len(chosen))
        start += size


def _polar(case: Case, u: np.ndarray, nudge: float) -> np.ndarray:
    options = case.option
    if options["ns_method"] == "svd":
        left, _, right = np.linalg.svd(u, full_matrices=False)
        return left @ right
    named, steps = options["ns_coeffs"], options.get("ns_steps")
    rows = ROWS[named][:steps] if isinstance(named, str) else (named,) * options["ns_steps"]
    how = options.get("preconditioning") or _PRECONDITIONING.get(str(named), "frobenius")
    if u.shape[0] > u.shape[1]:
        return _polar(case, u.T, nudge).T
    if how == "aol":
        # Invariant to scale; every row is divided by the root of its sum in |U U^T|.
        u = u / np.sqrt(np.abs(u @ u.T).sum(1, keepdims=True))
    left, s, right = np.linalg.svd(u, full_matrices=False)
    power = {"frobenius": 2, "schatten": 4, "schatten8": 8, "spectral": np.inf}.get(how)
    if power is not None:
        absolute = not options.get("relative_eps", case.factory != "muon")
        s = s / (np.linalg.norm(s, power) + 1e-8 * (absolute and how in ("frobenius", "spectral")))
    # The Gram form iterates on the squares, where rounding is absolute, and all steps add to it.
    absolute = 8 * nudge * (options["ns_method"] in ("gram", "auto"))
    moved = np.sqrt((s * (1 + nudge)) ** 2 + absolute)
    factor, y = np.ones_like(s), moved
    for a, b, c in rows:
        step = a + b * y**2 + c * y**4
        factor, y = factor * step, y * step
    return (left * (s * (1 + nudge) * factor)) @ right


def _adamw(
    case: Case, leaf: Leaf, p: np.ndarray, g: np.ndarray, state: list[np.ndarray], number: int
) -> np.ndarray:
    state[0] = 0.9 * state[0] + 0.1 * g
    state[1] = 0.95 * state[1] + 0.05 * g * g
    mean, square = state[0] / (1 - 0.9 ** (number + 1)), state[1] / (1 - 0.95 ** (number + 1))
    decay = case.option["weight_decay"] * _decays(case, leaf)
    return -_rate(case, number) * (mean / (np.sqrt(square) + 1e-8) + decay * p)


def clip_factors(case: Case) -> dict[str, np.ndarray]:
    """Returns what the clip multiplies queries and keys by, by path."""
    prefix = "" if case.factory == "apply_qk_clip" else "qk_clip_"
    threshold, alpha, shared_keys = (
        case.option[prefix + name] for name in ("threshold", "alpha", "shared_keys")
    )
    assert case.maxima is not None
    block, values = case.maxima
    maxima = np.asarray(values, np.float64)
    over = np.isfinite(maxima) & (maxima > threshold)
    gamma = np.where(over, threshold / np.where(over, maxima, 1.0), 1.0)
    shapes = {leaf.path: leaf.shape for leaf in case.leaves}
    heads, keys = gamma.shape[-1], shapes[f"{block}/key/kernel"][-2]
    least = gamma.reshape(*gamma.shape[:-1], keys, -1).min(-1)
    key = least ** (1 - alpha)
    if keys == heads:
        query = gamma**alpha
    elif shared_keys == "query":
        query, key = gamma, np.ones_like(key)
    else:
        whole = np.repeat(least, heads // keys, -1) if shared_keys == "group" else gamma
        query = whole / np.repeat(key, heads // keys, -1)
    factors = {}
    for role, factor in (("query", query), ("key", key)):
        factors[f"{block}/{role}/kernel"] = factor[..., None, :, None]
        factors[f"{block}/{role}/bias"] = factor[..., :, None]
    return {path: factor for path, factor in factors.items() if path in shapes}
