"""What a Muon step costs on a pod, on paper: FLOPs, bytes, memory and time of a device.

    python benchmarks/scaling.py

A model is a list of matrices and a number of other parameters. The terms are those of
docs/scaling.md, which also says how far they are from what the compilers report
(results/pods.json). Prints the Markdown tables that benchmarks/report.py writes there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import report_tables
from muonclip_jax.sharding.assignment import assign_longest_first

STEPS = 5
#: Bytes of a parameter, a gradient and a moment; of what products and results travel in.
WIDE, NARROW = 4, 2


# A TPU v5p. Published: 459 TFLOP/s, 2765 GB/s (XLA counts on 85 % of that), six links of 100 GB/s
# each way.
FLOPS, MEMORY_RATE, LINK = 459e12, 2.35e12, 600e9


@dataclass(frozen=True)
class Model:
    """A model as its optimizer sees it.

    Attributes:
        name: What it is.
        matrices: `(count, rows, columns)` of what Muon trains, a row for each kind.
        others: How many numbers AdamW trains.
        active: How many parameters a token uses.
        stack: The bound on a stack in bytes (`Distribution.max_stack_bytes`).
    """

    name: str
    matrices: tuple[tuple[int, int, int], ...]
    others: int
    active: float
    stack: int = 2**28

    @property
    def numbers(self) -> int:
        """How many numbers Muon trains."""
        return sum(count * rows * columns for count, rows, columns in self.matrices)


# By how they are held, for only what is held alike shares a stack's places: query, key and value;
# out; gate and up; down.
DENSE_7B = Model(
    "7B dense",
    ((72, 4096, 4096), (24, 4096, 4096), (48, 4096, 11008), (24, 11008, 4096)),
    262_344_704,
    5.1e9,
)
KIMI_K2 = Model(
    "Kimi K2",
    (
        (60 * 384 * 3 + 60 * 3, 2048, 7168),
        (61, 1536, 7168),
        (61, 1536, 12288),
        (61, 576, 7168),
        (61, 512, 16384),
        (61, 7168, 8192),
        (3, 7168, 18432),
    ),
    2_514_967_552,
    32e9,
    # 2**28 would be 17 rounds of experts, and a program that compiles long.
    stack=2**30,
)
#: By name, as in `pod_models.MODELS`.
MODELS = {model.name: model for model in (DENSE_7B, KIMI_K2)}


@dataclass(frozen=True)
class Plan:
    """How a model lies on devices.

    Attributes:
        devices: How many there are.
        split: How many of them share one matrix by columns.
        replicated: Whether every device holds every parameter.
        hops: Links that a byte of an all-to-all crosses: on a torus three quarters of its side.
        regrouped: Which part of the shared matrices has rows sharded over the axis that shares
            columns.
        bounded: Whether stacks are worked on one after another, each bounded by the model's
            `stack`; where there are few matrices they are one stack anyway.
    """

    devices: int
    split: int = 1
    replicated: bool = False
    hops: float = 1.0
    regrouped: float = 0.0
    bounded: bool = False


@dataclass(frozen=True)
class Cost:
    """What one device does in a step.

    Attributes:
        flops: Products of Newton-Schulz.
        sent: Bytes sent.
        temporary: Bytes of temporary memory.
        accessed: Bytes to and from memory.
        compute: Seconds of products.
        memory: Seconds of memory traffic.
        network: Seconds of sending.
    """

    flops: float
    sent: float
    temporary: float
    accessed: float
    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """One after another: nothing overlaps."""
        return self.compute + self.memory + self.network


def work(rows: int, columns: int) -> float:
    """FLOPs of the plain iteration on one matrix: `T (4 m^2 n + 2 m^3)`."""
    m, n = sorted((rows, columns))
    return STEPS * (4.0 * m * m * n + 2.0 * m**3)


@dataclass(frozen=True)
class _Hand:
    """What devices work on: the busiest one's counts, places in stacks, most small numbers."""

    ways: int
    counts: Sequence[int]
    places: Sequence[int]
    most: float


def _hand(counts: Sequence[int], shapes: Sequence[Sequence[int]], plan: Plan, ways: int) -> _Hand:
    groups = plan.devices // ways
    assigned = assign_longest_first(counts, [work(*shape) for shape in shapes], groups, counts)
    if assigned is None:
        return _of_hands([[math.ceil(count / groups) for count in counts]], shapes, ways)
    return _of_hands(assigned.counts, shapes, ways)


def _of_hands(dealt: Sequence[Sequence[int]], shapes: Sequence[Sequence[int]], ways: int) -> _Hand:
    busiest = max(dealt, key=lambda hand: _sum(hand, [work(*shape) for shape in shapes]))
    places = [max(column) for column in zip(*dealt, strict=True)]
    # One shape at a time has its m x m matrices.
    most = max(
        _sum(hand, [m * m * (one == (m, n)) for m, n in shapes])
        for hand in set(map(tuple, dealt))
        for one in {(m, n) for m, n in shapes}
    )
    return _Hand(ways, busiest, places, most)


def muon_cost(model: Model, plan: Plan) -> Cost:
    """The cost of a step of Muon on the matrices and AdamW on the rest.

    Whole matrices are dealt to the devices; or full rounds are whole, and what is left over is
    split over `plan.split` devices a matrix, where that is less work for the busiest one.

    Args:
        model: The model.
        plan: How it lies on the devices.

    Returns:
        The cost of the busiest device.
    """
    counts = [count for count, *_ in model.matrices]
    shapes = [sorted(shape) for _, *shape in model.matrices]
    flops = [work(*shape) for shape in shapes]
    rounds = [count // plan.devices for count in counts]
    choices = [
        [_hand(counts, shapes, plan, 1)],
        [
            _of_hands([rounds], shapes, 1),
            _hand([count % plan.devices for count in counts], shapes, plan, plan.split),
        ],
    ]
    chosen = min(choices, key=lambda hands: sum(_sum(h.counts, flops) / h.ways for h in hands))
    whole = sum(_sum(h.places, [m * n for m, n in shapes]) / h.ways for h in chosen)
    shared = sum(_sum(h.places, [m * n for m, n in shapes]) / h.ways * (h.ways > 1) for h in chosen)
    small = sum(_sum(h.counts, [m * m for m, _ in shapes]) for h in chosen)
    coupled = sum(_sum(h.counts, [m * m for m, _ in shapes]) * (1 - 1 / h.ways) for h in chosen)
    held = model.numbers / (1 if plan.replicated else plan.devices)
    # Everyone gives what it holds of others' matrices, and gets the rest of its own.
    trades = 0.0 if plan.replicated else (1 - 1 / plan.devices) * (WIDE + NARROW) * whole
    # Replicated: all results come to everyone; along one axis that is a whole torus as a sum, which
    # sends twice.
    times = (2 if plan.split == 1 else 1) if plan.replicated else 0
    gathers = times * NARROW * model.numbers * (1 - 1 / plan.devices)
    # A shared matrix: every step sums the Gram matrix (twice its size) and gathers its square.
    couples = 3 * STEPS * NARROW * coupled
    # Where the axis that shares columns shards rows so far, they are regrouped on both ways.
    regroups = (WIDE + NARROW) * shared * (1 - 1 / plan.split) * plan.regrouped
    accessed = (
        # Gradient, momentum and parameter read, momentum and parameter written; the direction and
        # the update in between, written and read.
        9 * WIDE * held
        # Packed, received, unpacked on both ways.
        + 4 * (WIDE + NARROW) * whole
        # A step reads X twice and writes it, and writes and reads the m x m matrices.
        + STEPS * NARROW * (3 * whole + 6 * small)
        + 7 * WIDE * model.others / (1 if plan.replicated else plan.devices)
    )
    # Results on their way to the update; a stack as it is received, and then as it is worked on,
    # with the small matrices of the shape that has most.
    stack = min(whole, model.stack / WIDE) if plan.bounded else whole
    most = max(h.most for h in chosen)
    if plan.bounded:
        most = max(m * m * max(1, model.stack // (WIDE * m * n)) for m, n in shapes)
    temporary = NARROW * held + max(WIDE * stack, NARROW * (stack + 3 * most))
    network = (trades * plan.hops + regroups + couples + gathers) / LINK
    busiest = sum(_sum(h.counts, flops) / h.ways for h in chosen)
    return Cost(
        busiest,
        trades + gathers + couples + regroups,
        temporary,
        accessed,
        busiest / FLOPS,
        accessed / MEMORY_RATE,
        network,
    )


def adamw_cost(model: Model, plan: Plan) -> Cost:
    """The cost of a step of AdamW on everything: four arrays are read, three are written."""
    numbers = (model.numbers + model.others) / (1 if plan.replicated else plan.devices)
    accessed = 7.0 * WIDE * numbers
    return Cost(0.0, 0.0, 0.0, accessed, 0.0, accessed / MEMORY_RATE, 0.0)


def break_even_tokens(model: Model, plan: Plan, share: float, utilisation: float = 0.4) -> float:
    """Tokens a step from which Muon adds at most `share` to a step with AdamW."""
    extra = muon_cost(model, plan).seconds - adamw_cost(model, plan).seconds
    a_token = 6 * model.active / (plan.devices * FLOPS * utilisation)
    return max(0.0, extra / share / a_token)


def _sum(counts: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(count * value for count, value in zip(counts, values, strict=True))


# The output projections have the axis "tp" on their rows: one place of square ones in all four.
REGROUPED = 4096 / (2 * 4096 + 2 * 11008)
# Sharded over one axis, all but the down projections have it on their rows.
REGROUPED_FSDP = (2 * 4096 + 11008) / (2 * 4096 + 2 * 11008)
#: Layouts of results/pods.json that the model is checked with: model, layout, devices -> plan.
CHECKED = {
    ("7B dense", "fsdp x tp", "v5p:8x8x8"): (
        DENSE_7B,
        Plan(512, split=4, hops=6, regrouped=REGROUPED),
    ),
    ("7B dense", "pipeline x fsdp x tp", "v5p:8x8x8"): (
        DENSE_7B,
        Plan(512, split=4, hops=6, regrouped=REGROUPED),
    ),
    ("7B dense", "fsdp", "v5p:8x8x8"): (
        DENSE_7B,
        Plan(512, split=4, hops=6, regrouped=REGROUPED_FSDP),
    ),
    ("7B dense", "replicated", "v5p:8x8x8"): (DENSE_7B, Plan(512, split=4, replicated=True)),
    ("7B dense", "replicated, 64", "v5p:4x4x4"): (DENSE_7B, Plan(64, replicated=True)),
}


#: Past what can be compiled: model and plan. The side of a torus of 8192 chips is about 20.
LARGE = (
    (DENSE_7B, Plan(512, split=4, hops=6, regrouped=REGROUPED)),
    (KIMI_K2, Plan(1024, split=8, hops=7.5, bounded=True)),
    (KIMI_K2, Plan(8192, split=8, hops=15, bounded=True)),
)


def cost_table() -> str:
    """What a step costs, as Markdown."""
    head = ["model", "devices", "TFLOPs", "sent GB", "temporary GB", "compute ms", "memory ms"]
    lines = []
    named = {case: f"{model}, {layout}" for (model, layout, _), case in reversed(CHECKED.items())}
    for model, plan in dict.fromkeys([*CHECKED.values(), *LARGE]):
        cost = muon_cost(model, plan)
        numbers = (cost.flops / 1e12, cost.sent / 1e9, cost.temporary / 1e9)
        times = (cost.compute * 1e3, cost.memory * 1e3, cost.network * 1e3)
        cells = [f"{number:.3g}" for number in numbers + times]
        name = named.get((model, plan), model.name)
        lines.append([name, f"{plan.devices}", *cells])
    return report_tables.table([*head, "network ms"], lines)


def break_even_table() -> str:
    """From how many tokens a step on Muon adds little to it, as Markdown."""
    head = ["model", "devices", "AdamW ms", "Muon ms", "tokens a step: 1 % more", "0.1 % more"]
    lines = []
    for model, plan in LARGE:
        muon, adamw = (cost(model, plan).seconds * 1e3 for cost in (muon_cost, adamw_cost))
        tokens = [break_even_tokens(model, plan, share) / 1e6 for share in (0.01, 0.001)]
        cells = [f"{adamw:.2f}", f"{muon:.2f}", *(f"{number:.0f} M" for number in tokens)]
        lines.append([model.name, f"{plan.devices}", *cells])
    return report_tables.table(head, lines)


if __name__ == "__main__":
    print(cost_table(), break_even_table(), sep="\n\n")
