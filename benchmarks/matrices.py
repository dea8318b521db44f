"""Matrices to orthogonalise, by family, and how near a result comes to their polar factor."""

from collections.abc import Mapping

import numpy as np

from muonclip_jax.newton_schulz.plan import ResolvedPlan

Shape = tuple[int, int]

#: A singular value beyond this is on its way out; no set is meant to pass 1.21.
DIVERGED = 1.6
MOMENTUM = "momentum"
#: Values below this share of the largest are the rounding of the float32 input.
_ROUNDING = 3e-7


def spectra(m: int, n: int) -> dict[str, np.ndarray]:
    """Returns one `(m, n)` matrix a family, in float64."""
    rng = np.random.default_rng(0)
    small = min(m, n)
    left, _ = np.linalg.qr(rng.normal(size=(m, small)))
    right, _ = np.linalg.qr(rng.normal(size=(n, small)))

    def with_values(values: np.ndarray) -> np.ndarray:
        return (left * values) @ right.T

    low_rank = rng.normal(size=(m, 8)) @ rng.normal(size=(8, n)) / np.sqrt(8)
    return {
        "gaussian": rng.normal(size=(m, n)),
        "low rank + 1 % noise": low_rank + 0.01 * rng.normal(size=(m, n)),
        **{f"cond 1e{p}": with_values(np.logspace(0, -p, small)) for p in (3, 4, 5, 6)},
        "power law": with_values(1 / np.arange(1, small + 1)),
        "rank one": np.outer(rng.normal(size=m), rng.normal(size=n)),
    }


def minimax_rows(lower: float, steps: int, cushion: float = 0.0) -> list[tuple[float, ...]]:
    """Composes odd quintics, each nearest to 1 on what those before leave of `[lower, 1]` (Remez).

    Polar Express (arXiv 2505.16932, algorithm 1) keeps the left end above `cushion * upper`.
    """
    rows, upper = [], 1.0
    for _ in range(steps):
        left = max(lower, cushion * upper)
        x = left + (upper - left) * np.array([0, 0.25, 0.75, 1])
        row = np.zeros(3)
        for _ in range(30):
            system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
            row = np.linalg.solve(system, np.ones(4))[:3]
            x[1:3] = np.sqrt(np.sort(np.roots(row[::-1] * (5, 3, 1)).real))
        ends = [row @ (end, end**3, end**5) for end in (lower, upper)]
        row = row * (2 / sum(ends) if left > lower else 1)
        rows.append(tuple(map(float, row)))
        lower = float(row @ (lower, lower**3, lower**5))
        upper = 2 - lower
    return rows


class Reference:
    """The exact polar factors of wide matrices `(count, rows, columns)`, as a reference."""

    def __init__(self, x: np.ndarray):
        self.x = np.asarray(x, np.float64)
        self.left, self.values, self.right = np.linalg.svd(self.x, full_matrices=False)
        self.keep = self.values > _ROUNDING * self.values[:, :1]
        self.polar = (self.left * self.keep[:, None, :]) @ self.right

    def quality(self, y: np.ndarray) -> list[dict[str, float]]:
        """Measures each of `(count, rows, columns)` results; all NaN where one is not finite.

        Returns:
            `largest` singular value; `rms` of the distances of the singular values from one;
            `cosine` to the exact polar factor.
        """
        found = []
        for i, result in enumerate(np.asarray(y, np.float64)):
            names = ("largest", "rms", "cosine")
            if not np.isfinite(result).all():
                found.append(dict.fromkeys(names, float("nan")))
                continue
            # By the eigenvalues of the small Gram matrix: to 1e-8, and far quicker than by an SVD.
            squares = np.linalg.eigvalsh(result @ result.T)[::-1][: int(self.keep[i].sum())]
            out = np.sqrt(np.maximum(squares, 0))
            size = np.linalg.norm(self.polar[i]) * np.linalg.norm(result)
            cosine = (self.polar[i] * result).sum() / size
            numbers = (out[0], np.sqrt(((out - 1) ** 2).mean()), cosine)
            found.append(dict(zip(names, map(float, numbers), strict=True)))
        return found


def over_all(qualities: list[dict[str, float]]) -> dict[str, float]:
    """Summarises qualities: the largest of what must be small, the smallest cosine, the mean RMS.

    NaN anywhere is NaN in the result.
    """
    columns = {name: np.array([q[name] for q in qualities]) for name in qualities[0]}
    reduced = {
        name: values.min() if name == "cosine" else values.max() for name, values in columns.items()
    }
    reduced["rms"] = np.sqrt((columns["rms"] ** 2).mean())
    reduced["mean_cosine"] = columns["cosine"].mean()
    return {name: float(value) for name, value in reduced.items()}


def diverges(quality: Mapping[str, float]) -> bool:
    """Tells whether a result is not finite or has a singular value beyond `DIVERGED`."""
    return not bool(quality["largest"] <= DIVERGED)


def needed_flops(plan: ResolvedPlan, rows: int, columns: int) -> float:
    """Counts the operations of all products on one matrix, `rows <= columns`, symmetric ones half.

    `X X^T`, the square of a symmetric matrix and the product of two that commute are symmetric: of
    `2 m k n` operations one triangle is all that has to be computed.

    Example:
        >>> from muonclip_jax.newton_schulz import plan_polar
        >>> plain = plan_polar("keller_jordan", ns_method="standard")
        >>> needed_flops(plain.resolve((8, 16), "float32"), 8, 16)  # 5 n^3 (3 * 2 + 1)
        17920.0
    """
    passes = len(plan.restarts) + 1 if plan.method == "gram" else len(plan.rows)
    # Of each pass half of `X X^T` and a whole product with `X`; of all others half.
    return plan.flops / 2 + passes * rows * rows * columns
