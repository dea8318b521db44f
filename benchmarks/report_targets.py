"""The report's table of targets: what was aimed at, and what came out."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.optimizers import FAST, KERNELS, OPTAX, OURS
from benchmarks.report_text import Results, by, missing, table, times
from muonclip_jax.kernels.symmetric.reference import SPLIT_FROM

ADAMW = "optax.adamw"
TORCH = "torch.optim.Muon, float32"
TORCH_BFLOAT16 = "torch.optim.Muon, bfloat16"
#: How far ours may be from Optax's answer, in relative Frobenius norm.
SAME_ANSWER = 1e-4


def _reached(is_reached: bool) -> str:
    return "yes" if is_reached else "no"


def compile_against_others(results: Results) -> tuple[str, bool]:
    """Compile time at 48 layers against Optax's Muon, and against AdamW."""
    ratios = by(results["compile_time"]["ratios"], "layers", "contender")
    optax, adamw = (ratios[48, name]["over_ours"] for name in (OPTAX, ADAMW))
    over_adamw = 1 / adamw["median"]
    text = f"{times(optax)}; {over_adamw:.2f} x AdamW's"
    return text, optax["median"] >= 10 and over_adamw <= 1.1


def compile_growth(results: Results) -> tuple[str, bool]:
    """How compile time grows from 12 to 96 layers."""
    ratios = by(results["compile_time"]["ratios"], "layers", "contender")
    ours, adamw = (ratios[96, name]["growth"] for name in (OURS, ADAMW))
    return f"{times(ours)}, AdamW's {times(adamw)}", ours["median"] <= adamw["median"]


def step_same(results: Results) -> tuple[str, bool]:
    """The step with the same polynomial."""
    rows = by(results["step_time"]["rows"], "contender")
    found, difference = rows[OPTAX]["over_ours"], rows[OURS]["difference_from_optax"]
    text = f"{times(found)}, answers differ by {difference:.0e}"
    return text, found["median"] >= 2.3 and difference <= SAME_ANSWER


def is_as_near(stored: Mapping[str, Any]) -> bool:
    """Tells whether the cheaper settings are no farther than five Keller-Jordan steps.

    By the RMS of (sigma - 1) and the mean cosine, on Gaussian matrices of the model's shapes and on
    the momentum of a training run.
    """
    rows = by(stored["rows"], "contender")
    pairs = [(rows[FAST]["quality"], rows[OPTAX]["quality"])]
    if "momentum_quality" in stored:
        found = stored["momentum_quality"]
        pairs.append((found[FAST], found[OPTAX]))
    return all(
        fast["rms"] <= plain["rms"] and fast["mean_cosine"] >= plain["mean_cosine"]
        for fast, plain in pairs
    )


def step_as_near(results: Results) -> tuple[str, bool]:
    """The step at equal or better orthogonality."""
    stored = results["step_time"]
    found = by(stored["rows"], "contender")[OPTAX]["over_fast"]
    near = is_as_near(stored)
    text = f"{times(found)}, {'no farther' if near else 'farther'} from the polar factor"
    return text, found["median"] >= 3 and near


def step_torch(results: Results) -> tuple[str, bool]:
    """The step against torch."""
    rows = by(results["step_time"]["rows"], "contender")
    if TORCH not in rows:
        return "not measured: torch is not installed (`make bench` installs it)", False
    same, near = rows[TORCH]["over_ours"], rows[TORCH]["over_fast"]
    beside = rows[TORCH_BFLOAT16]["over_ours"] if TORCH_BFLOAT16 in rows else None
    text = f"{times(same)}; {times(near)}"
    text += f"; its bfloat16 {times(beside)}" if beside else ""
    return text, same["median"] >= 1.0 and near["median"] >= 1.2


def memory(results: Results) -> tuple[str, bool]:
    """Temporary memory of the step."""
    stored = results["step_time"]
    rows = by(stored["rows"], "contender")
    ours, optax = (rows[n]["temporary_bytes"] / stored["matrix_bytes"] for n in (OURS, OPTAX))
    return f"{100 * ours:.0f} % (Optax {100 * optax:.0f} %)", ours <= 0.25


def rate(results: Results) -> tuple[str, bool]:
    """Whole products over time; where more than 100 %, symmetry has been used."""
    rows = [row for row in results["polar_time"]["rows"] if "products" in row]
    parts, good = [], True
    for row in rows:
        if "keller_jordan" not in row["contender"]:
            continue
        share = row["whole_products_over_time"]
        # In the Gram form too: smaller symmetric products are computed whole.
        has_halves = min(row["shape"]) >= SPLIT_FROM
        parts.append("{} x {}, {}: {:.0f} %".format(*row["shape"], row["method"], 100 * share))
        good = good and (share > 1 if has_halves else share >= 0.95)
    return "; ".join(dict.fromkeys(parts)), good


def gpu_step(results: Results) -> tuple[str, bool]:
    """The step of a 1.3B tree on a GPU."""
    rows = by(results["step_time_1.3b_gpu"]["rows"], "contender")
    found = rows[OPTAX]["over_ours"]
    text = times(found)
    if KERNELS in rows:
        with_kernels = rows[KERNELS]["over_ours"]["median"]
        text += f"; with kernels ours takes {with_kernels:.2f} x its time"
    return text, found["median"] >= 5


def gpu_product(results: Results) -> tuple[str, bool]:
    """One symmetric product on a GPU, single matrices in bfloat16."""
    parts, good = [], True
    for case in results["kernel_speed_gpu"]["cases"]:
        size = case["case"].removeprefix("b R + c R R, ")
        if case["dtype"] != "bfloat16" or not size.isdigit() or int(size) < 2048:
            continue
        kernels = {n: k for n, k in case["contenders"].items() if not n.startswith("xla")}
        best = max((k["full product over this"] for k in kernels.values()), key=_median)
        parts.append(f"{size}: {times(best)}")
        good = good and best["median"] >= 1.5
    return "; ".join(parts), good


def _median(found: Mapping[str, Any]) -> float:
    return found["median"]


def gpu_polar(results: Results) -> tuple[str, bool]:
    """Whole polar factors on a GPU: each shape with kernels or without."""
    parts: list[str] = []
    reached: dict[str, bool] = {}
    for row in results["polar_time_gpu"]["rows"]:
        if row["contender"].startswith("ours, keller_jordan, auto"):
            share, speed = row["needed_products_over_time"], row["optax_over_this"]
            kernels = " with kernels" if row["contender"].endswith("kernels") else ""
            shape = "{} x {}".format(*row["shape"])
            parts.append(f"{shape}{kernels}: {100 * share:.0f} %, {times(speed)}")
            reached[shape] = reached.get(shape, False) or (share >= 0.75 and speed["median"] >= 1.6)
    return "; ".join(parts), all(reached.values())


Evaluate = Callable[[Results], tuple[str, bool]]
#: What was aimed at, the target, which result says it, and how it is read.
TARGETS: tuple[tuple[str, str, str, Evaluate], ...] = (
    (
        "compile, 48 layers of 256: Optax / ours",
        "at least 10; ours at most 1.1 x AdamW's",
        "compile_time",
        compile_against_others,
    ),
    ("compile, growth from 12 to 96 layers", "at most AdamW's", "compile_time", compile_growth),
    (
        "CPU step, GPT-2 small, same polynomial: Optax / ours",
        "at least 2.3, same answer to 1e-4",
        "step_time",
        step_same,
    ),
    (
        "CPU step, equal or better orthogonality: Optax / ours",
        "at least 3",
        "step_time",
        step_as_near,
    ),
    (
        "CPU step: `torch.optim.Muon` in float32 / ours",
        "1.0 at the same polynomial; 1.2 at equal or better orthogonality",
        "step_time",
        step_torch,
    ),
    (
        "temporary memory of that step over the matrices' bytes",
        "at most 25 %",
        "step_time",
        memory,
    ),
    (
        "CPU: time of the iteration's products by XLA alone / time of the iteration, float32",
        f"over 100 % where symmetry is used (from {SPLIT_FROM} rows on), at least 95 % elsewhere",
        "polar_time",
        rate,
    ),
    (
        "GPU: XLA's full product / symmetric product, bfloat16, n >= 2048",
        "at least 1.5",
        "kernel_speed_gpu",
        gpu_product,
    ),
    (
        "GPU: needed products / time; five plain steps by XLA / ours",
        "at least 75 %; at least 1.6",
        "polar_time_gpu",
        gpu_polar,
    ),
    ("GPU step, 1.3B: Optax / ours", "at least 5", "step_time_1.3b_gpu", gpu_step),
)


def targets_table(results: Results) -> str:
    """Returns all targets with what came out."""
    lines = []
    for what, target, needs, evaluate in TARGETS:
        if needs not in results:
            lines.append([what, target, missing(needs), ""])
            continue
        try:
            text, is_reached = evaluate(results)
        except KeyError as left_out:  # a run of some contenders or depths only
            lines.append([what, target, f"not measured: that run left out {left_out}", ""])
            continue
        lines.append([what, target, text, _reached(is_reached)])
    return table(["", "target", "measured", "reached"], lines)
