"""What a compiled program does on one device, read from its text: products and collectives.

`Compiled.as_text()` is the optimised, partitioned program of one device: computations that call
each other. XLA's own cost analysis counts the body of a loop once and knows nothing of GPUs; here a
body counts as often as it runs, where the compiler says how often (`known_trip_count`). Of the
branches of a conditional the costliest counts, for that is what the slowest device does.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.replica_groups import read_groups

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPERATION = re.compile(r"^ ([\w-]+)\(")
_TRIPS = re.compile(r'known_trip_count"?:?\s*\{"n":"(\d+)"')


class Collective(NamedTuple):
    """Collectives of one kind: how many run, and the bytes that the device sends."""

    kind: str
    in_loop: bool
    runs: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Tally:
    """What a program, or a part of it, does on one device.

    Attributes:
        flops: Floating-point operations of its products.
        collectives: What it exchanges, by the ring algorithm of each kind.
        loops: How many loops there are.
        unknown_loops: How many of them run an unknown number of times; those count once.
    """

    flops: float = 0.0
    collectives: tuple[Collective, ...] = ()
    loops: int = 0
    unknown_loops: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.flops + other.flops,
            self.collectives + other.collectives,
            self.loops + other.loops,
            self.unknown_loops + other.unknown_loops,
        )

    def looped(self, trips: int, known: bool) -> "Tally":
        """The tally of a loop with this body."""
        collectives = tuple(
            Collective(each.kind, True, trips * each.runs, trips * each.sent)
            for each in self.collectives
        )
        loops, unknown = self.loops + 1, self.unknown_loops + (not known)
        return Tally(self.flops * trips, collectives, loops, unknown)

    @property
    def bytes_sent(self) -> float:
        """All bytes that the device sends."""
        return sum(each.sent for each in self.collectives)

    def by_kind(self, in_loops: bool | None = None) -> dict[str, dict[str, float]]:
        """Kind -> count and bytes; of those in loops, outside of them, or (None) all."""
        kinds: dict[str, dict[str, float]] = {}
        for each in sorted(self.collectives):
            if in_loops in (None, each.in_loop):
                row = kinds.setdefault(each.kind, {"count": 0, "bytes": 0.0})
                row["count"] += each.runs
                row["bytes"] += each.sent
        return kinds


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: str
    attributes: str


def tally(text: str | None) -> Tally:
    """Returns what one device does in a program, `Compiled.as_text()`."""
    computations, entry, devices = _parse(text)
    done: dict[str, Tally] = {}

    def total(name: str) -> Tally:
        if name not in done:
            instructions = computations.get(name, {})
            result = Tally()
            for instruction in instructions.values():
                result += _one(instruction, instructions, devices) + _called(instruction)
            done[name] = result
        return done[name]

    def _called(instruction: _Instruction) -> Tally:
        attributes = instruction.attributes
        if instruction.operation == "while":
            trips = _TRIPS.search(attributes)
            body = total(re.findall(r"\bbody=%?([\w.-]+)", attributes)[0])
            return body.looped(int(trips[1]) if trips else 1, trips is not None)
        if instruction.operation == "conditional":
            listed = re.findall(r"branch_computations=\{([^}]*)\}", attributes)
            names = re.findall(r"[\w.-]+", listed[0]) if listed else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.-]+)", attributes)
            return max(map(total, names), key=lambda t: (t.flops, t.bytes_sent), default=Tally())
        result = Tally()
        for name in re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", attributes):
            result += total(name)
        return result

    return total(entry)


def device_groups(text: str | None) -> list[tuple[int, ...]]:
    """Returns the groups of all collectives of a program, and the pairs of those that permute.

    A device has the number of its place in the mesh of the program.
    """
    computations, _, devices = _parse(text)
    return [
        group
        for instructions in computations.values()
        for each in instructions.values()
        if each.operation.removesuffix("-start") in COLLECTIVES
        for group in read_groups(each.attributes, devices)
    ]


def _parse(text: str | None) -> tuple[dict[str, dict[str, _Instruction]], str, int]:
    """The computations, the name of the one that is run, and for how many devices they are."""
    assert text is not None, "the platform's compiler does not give the text of the program"
    named = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and " = " not in line.split("{")[0]:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _read(line):
            current[instruction.name] = instruction
    return computations, entry, max(map(int, named), default=1)


def _read(line: str) -> _Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    name, rest = match.groups()
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    operation = _OPERATION.match(rest[end:])
    if operation is None:
        return None
    start = end + operation.end() - 1
    stop = start + _closing(rest[start:])
    return _Instruction(name, rest[:end], operation[1], rest[start + 1 : stop], rest[stop + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` is closed."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return index
    return len(text) - 1


def _elements(text: str) -> list[str]:
    """The types in the type of a tuple."""
    elements, depth = [""], 0
    for letter in text[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def _one(instruction: _Instruction, others: Mapping[str, _Instruction], devices: int) -> Tally:
    """What an instruction does by itself, without the computations that it calls."""
    kind = instruction.operation.removesuffix("-start")
    if kind in COLLECTIVES:
        sent = _sent(kind, instruction, devices)
        return Tally(collectives=(Collective(kind, False, 1, sent),))
    if instruction.operation in ("dot", "convolution"):
        operands = [
            _dims(others[name].type if name in others else operand)
            for operand in re.split(r",(?![^\[]*\])(?![^{]*\})", instruction.operands)
            for name in re.findall(r"%?([\w.-]+)$", operand.strip())
        ]
        count = _dot if instruction.operation == "dot" else _convolution
        return Tally(flops=count(instruction, operands))
    if "__cublas$" in instruction.attributes:
        lhs = _dims(others[re.findall(r"%?([\w.-]+)", instruction.operands)[0]].type)
        return Tally(flops=_dot(instruction, [lhs]))
    return Tally()


def _dims(text: str) -> tuple[int, ...]:
    match = _SHAPE.search(text)
    return tuple(map(int, match[2].split(","))) if match and match[2] else ()


def _size(kind: str, dims: str) -> float:
    width = _BYTES.get(kind)
    if width is None:
        bits = re.search(r"\d+", kind)
        width = int(bits[0]) / 8 if bits else 0
    return width * math.prod(map(int, dims.split(","))) if dims else float(width)


def _sent(kind: str, instruction: _Instruction, devices: int) -> float:
    """Bytes that a device sends, by the ring algorithm."""
    results = instruction.type
    is_start = instruction.operation.endswith("-start")
    if is_start and (kind != "all-reduce" or results.startswith("((")):
        # Operands, results, and what it works with; an all-reduce may say its results alone.
        results = _elements(results)[1]
    size = sum(_size(*shape) for shape in _SHAPE.findall(results))
    if kind == "collective-permute":
        return size
    group = len(read_groups(instruction.attributes, devices)[0])
    share = (group - 1) / group
    return {"all-reduce": 2 * size * share, "reduce-scatter": size * (group - 1)}.get(
        kind, size * share
    )


def _dot(instruction: _Instruction, operands: list[tuple[int, ...]]) -> float:
    """A product of XLA's, or of a library: of its results the first one is the product."""
    numbers = re.search(
        r'lhs_contracting_dim(?:ension)?s"?[=:][{[]([\d,"]*)[}\]]', instruction.attributes
    )
    axes = [int(axis) for axis in re.findall(r"\d+", numbers[1])] if numbers else []
    contracted = math.prod(operands[0][axis] for axis in axes)
    return 2.0 * math.prod(_dims(instruction.type)) * contracted


def _convolution(instruction: _Instruction, operands: list[tuple[int, ...]]) -> float:
    """A TPU's products are convolutions; batch axes are spatial ones with holes in between."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    lhs, rhs = (
        dict(zip(label, dims, strict=True))
        for label, dims in zip((labels[1], labels[2]), operands, strict=True)
    )
    out = dict(zip(labels[3], _dims(instruction.type), strict=True))
    flops = 2.0 * out["b"] * out["f"] * rhs["i"]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for number, axis in enumerate(sorted(set(out) - {"b", "f"})):
        flops *= _positions(
            lhs[axis],
            rhs[axis],
            out[axis],
            {name: value.split("x")[number] for name, value in fields.items()},
        )
    return flops


def _positions(base: int, kernel: int, out: int, window: Mapping[str, str]) -> int:
    """How many pairs of an output and a kernel position meet an entry of the base."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride = int(window.get("stride", "1"))
    base_step, kernel_step = int(window.get("lhs_dilate", "1")), int(window.get("rhs_dilate", "1"))
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_step - low
    return int(((at >= 0) & (at <= (base - 1) * base_step) & (at % base_step == 0)).sum())
