"""The report's table of floors: what a CPU step cannot be faster than, at XLA's own rate."""

from benchmarks.counting import KINDS, count_products, full_flops, needed_flops, product_flops
from benchmarks.models import MODELS
from benchmarks.optimizers import FAST, OPTAX, OURS, POLAR_SETTINGS
from benchmarks.report_text import Results, by, missing, ranged, table
from muonclip_jax.kernels.symmetric.reference import SPLIT_FROM
from muonclip_jax.polar import plan_polar
from muonclip_jax.polar.plan import ResolvedPlan

# Three of 2 x 2 blocks.
_TRIANGLE = 0.75


def plan_of(name: str, shape: tuple[int, int]) -> ResolvedPlan:
    """What an optimizer runs on a matrix in float32 on a CPU."""
    if name == OPTAX:
        return plan_polar("keller_jordan", ns_method="standard").resolve(shape, "float32", "cpu")
    return plan_polar(**POLAR_SETTINGS[name]).resolve(shape, "float32", "cpu")


def computed(name: str, shape: tuple[int, int]) -> dict[str, float]:
    """Operations of each kind of product that are really computed on one matrix.

    Example:
        >>> computed(OPTAX, (2, 4))["gram"], computed(OURS, (2, 4))["gram"] < 5 * 32
        (160.0, True)
    """
    counts, flops = count_products(plan_of(name, shape)), product_flops(*shape)
    split = name != OPTAX and shape[0] >= SPLIT_FROM
    share = {kind: _TRIANGLE if split and kind != "update" else 1.0 for kind in KINDS}
    return {kind: share[kind] * counts[kind] * flops[kind] for kind in KINDS}


def floor_table(results: Results) -> str:
    """Operations of the step, the time of them at XLA's rate, and the time that was measured."""
    for name in ("step_time", "polar_time"):
        if name not in results:
            return missing(name)
    matrices = MODELS["gpt2-small"].matrices()
    rates = {
        (tuple(row["shape"]), row["contender"].removeprefix("product: ")): row["flops_per_second"]
        for row in results["polar_time"]["rows"]
        if "flops_per_second" in row
    }
    if any((shape, kind) not in rates for shape in matrices for kind in KINDS):
        return missing("polar_time")  # a run of other shapes
    steps = by(results["step_time"]["rows"], "contender")
    lines = []
    for name in (OPTAX, OURS, FAST):
        whole = sum(n * full_flops(plan_of(name, s), *s) for s, n in matrices.items())
        needed = sum(n * needed_flops(plan_of(name, s), *s) for s, n in matrices.items())
        parts = {s: computed(name, s) for s in matrices}
        done = sum(n * sum(parts[s].values()) for s, n in matrices.items())
        seconds = sum(
            n * parts[s][kind] / rates[s, kind] for s, n in matrices.items() for kind in KINDS
        )
        measured = steps[name]["seconds"]
        lines.append(
            [
                name,
                *(f"{flops / 1e9:.0f}" for flops in (whole, done, needed)),
                f"{seconds:.1f}",
                ranged(measured, 1),
                f"{100 * seconds / measured['median']:.0f} %",
            ]
        )
    head = ["", "GFLOP, whole products", "computed", "needed", "s at XLA's rate", "s measured", ""]
    return table(head, lines)
