"""Muon, its shape scale, decay, AdamW and the clip in float64 NumPy, after the papers.

Nothing of the library is used: momentum and Nesterov lookahead (Jordan et al. 2024), the odd
quintic on the singular values of the direction, the shape scale (Liu et al. 2025, Lemma 1),
decoupled decay (Loshchilov and Hutter 2019) and QK-Clip (Kimi K2, Algorithm 1).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.fuzz.draw import Case, Leaf

Arrays = dict[str, np.ndarray]  # by path

#: Rows as the sources print them.
ROWS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "keller_jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "minimax4": (
        (8.383673612923165, -24.765905857974534, 18.357081892887596),
        (4.04342043370043, -3.011404993841536, 0.569512150319183),
        (3.505570617243893, -2.6266538356181015, 0.5257194048203224),
        (2.490115939444256, -1.8342750827526721, 0.43683470689542514),
    ),
}
#: The order of the Schatten norm that singular values are divided by.
_NORM = {"frobenius": 2, "schatten": 4, "schatten8": 8, "spectral": np.inf}


def two_updates(
    case: Case, params: Arrays, first: Arrays, second: Arrays, nudge: float = 0.0
) -> list[Arrays]:
    """Returns the updates of two steps from parameters and the gradients of each.

    What the `nudge` of the normalised singular values does to them is what rounding may do: the odd
    quintics are steep, at the end of their interval above all, where matrices of rank one lie.
    """
    state = {path: (np.zeros_like(x), np.zeros_like(x)) for path, x in params.items()}
    results = []
    for step, gradients in enumerate((first, second), start=1):
        rate = 0.125 - 0.03125 * (step - 1)  # optax.linear_schedule(0.125, 0.0625, 2)
        updates: Arrays = {}
        for leaf in case.leaves:
            p, g = params[leaf.path], gradients[leaf.path]
            mean, square = state[leaf.path]
            if leaf.dims is not None:
                beta = case.options["beta"]
                mean = beta * mean + (1 - beta) * g
                direction = _muon(case, leaf, mean, g, step, nudge)
            else:
                mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
                direction = mean / (1 - 0.9**step)
                direction = direction / (np.sqrt(square / (1 - 0.95**step)) + 1e-8)
            state[leaf.path] = mean, square
            if case.factory != "scale_by_muon":
                decay = case.options["weight_decay"] if leaf.dims else 0.0
                direction = -rate * (direction + decay * p)
            updates[leaf.path] = direction
        for path, factor in clip_factors(case).items():
            p, u = params[path], updates[path]
            updates[path] = np.where(factor != 1, factor * (p + u) - p, u)
        results.append(updates)
        params = {path: x + updates[path] for path, x in params.items()}
    return results


def _muon(
    case: Case, leaf: Leaf, m: np.ndarray, g: np.ndarray, step: int, nudge: float
) -> np.ndarray:
    options, beta = case.options, case.options["beta"]

    def corrected(x: np.ndarray, steps: int) -> np.ndarray:
        return x / (1 - beta**steps) if options.get("bias_correction") else x

    u = corrected(m, step)
    if options["nesterov"]:
        u = beta * corrected(m, step + 1) + (1 - beta) * corrected(g, step)
    result = np.zeros_like(u)
    for place, shape in _matrices(leaf):
        result[place] = _polar(case, u[place].reshape(shape), nudge).reshape(u[place].shape)
    if options.get("adaptive"):
        result = np.sum(u * result) * result
    if case.factory == "scale_by_muon":
        return result
    for place, (fan_in, fan_out) in _matrices(leaf):
        rms = options["consistent_rms"]
        scale = math.sqrt(max(1, fan_out / fan_in))
        result[place] *= scale if rms is None else rms * math.sqrt(max(fan_in, fan_out))
    return result


def _matrices(leaf: Leaf) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Where the matrices of a leaf are, and their shapes as (inputs, outputs)."""
    rows, columns = (math.prod(leaf.shape[axis] for axis in axes) for axes in leaf.dims or ())
    if leaf.split is None:
        # In every tree of the fuzzer inputs are before outputs and dimensions that count are first.
        for index in np.ndindex(*(leaf.shape[axis] for axis in leaf.batch)):
            yield index, (rows, columns)
        return
    _, sizes, view, along = leaf.split
    where = np.indices(view or (sum(sizes),))[along].reshape(-1)
    start = 0
    for size in sizes:
        chosen = np.flatnonzero((where >= start) & (where < start + size))
        yield (slice(None), chosen), (rows, len(chosen))
        start += size


def _polar(case: Case, u: np.ndarray, nudge: float) -> np.ndarray:
    options, coefficients = case.options, case.options["ns_coeffs"]
    if options["ns_method"] == "svd":
        left, _, right = np.linalg.svd(u, full_matrices=False)
        return left @ right
    if u.shape[0] > u.shape[1]:
        return _polar(case, u.T, nudge).T
    rows = ROWS.get(coefficients, (coefficients,) * 2)[: options.get("ns_steps")]
    if coefficients == "minimax4":  # in 16 bits these steep rows run with a safety factor
        f = {"float16": 1.002, "bfloat16": 1.016}.get(str(options["ns_dtype"]), 1.0)
        rows = [(a / f, b / f**3, c / f**5) for a, b, c in rows]
    default = "schatten8" if coefficients == "minimax4" else "frobenius"
    how = options["preconditioning"] or default
    if how == "aol":
        # Invariant to scale; every row is divided by the root of its sum in |U U^T|.
        u = u / np.sqrt(np.abs(u @ u.T).sum(1, keepdims=True))
    left, s, right = np.linalg.svd(u, full_matrices=False)
    if how != "aol":
        s = s / np.linalg.norm(s, _NORM[how])
    # The Gram form iterates on the squares, where rounding is absolute, and all steps add to it.
    gram = 8 * nudge * (options["ns_method"] in ("gram", "auto"))
    y = np.sqrt((s * (1 + nudge)) ** 2 + gram)
    factor = s * (1 + nudge)
    for a, b, c in rows:
        step = a + b * y**2 + c * y**4
        factor, y = factor * step, y * step
    return (left * factor) @ right


def clip_factors(case: Case) -> Arrays:
    """Returns what the clip multiplies queries and keys by."""
    if case.maxima is None:
        return {}
    threshold, alpha, shared_keys = (
        case.options[f"qk_clip_{name}"] for name in ("threshold", "alpha", "shared_keys")
    )
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
