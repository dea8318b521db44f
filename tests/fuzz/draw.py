"""A configuration as plain data, and the one that a seed draws."""

import dataclasses
import math
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Entry = str | tuple[str, ...] | None
Axis = tuple[str, int, str]  # name, size, "Auto" or "Explicit"

#: Option -> values, the simplest first. Few steps show what many do, and compile faster.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "ns_coeffs": ("keller_jordan", "keller_jordan", "minimax4", "minimax4", (2.0, -1.5, 0.5)),
    "preconditioning": (*(None,) * 15, "frobenius", "spectral", "aol", "schatten", "schatten8"),
    "ns_method": (*("standard", "auto") * 3, "gram", "gram", "svd"),
    "ns_dtype": (*(None,) * 16, "float32", "float32", "bfloat16", "float16"),
    "beta": (0.95, 0.8, 0.0),
    "nesterov": (True, True, False),
    "mu_dtype": (*(None,) * 8, "float32", "bfloat16"),
}
OPTIONS_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "scale_by_muon": {"adaptive": (False, True), "bias_correction": (False, True)},
    "muonclip": {"weight_decay": (0.0, 0.3), "consistent_rms": (0.2, None)},
    "clip": {
        "qk_clip_threshold": (100.0, 60.0),
        "qk_clip_alpha": (0.5, 0.25, 1.0),
        "qk_clip_shared_keys": ("query", "query", "query", "group", "balanced"),
    },
}
_DISTRIBUTION: dict[str, tuple[Any, ...]] = {
    "max_matrix_bytes": (64, 400, 1500),
    "max_stack_bytes": (1, 1000, 4000),
    "flops_per_byte": (0.0, 1.0, 1e30),
    "shard_momentum": (True,),
}


@dataclasses.dataclass
class Leaf:
    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # rows, columns; None: Adam's
    split: tuple[int, tuple[int, ...], tuple[int, ...] | None, int] | None = None  # of `Split`
    dtype: str = "float32"
    spec: tuple[Entry, ...] = ()  # mesh axes of each dimension

    @property
    def batch(self) -> tuple[int, ...]:
        """Dimensions that count matrices."""
        matrix = sum(self.dims or (), ())
        return tuple(i for i in range(len(self.shape)) if self.dims and i not in matrix)


@dataclasses.dataclass
class Case:
    """One configuration."""

    seed: int  # of the arrays
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    x64: bool = False
    mesh: tuple[Axis, ...] = ()  # () is one device without a mesh
    mode: str = "jit"  # or "eager", "shard_map"
    set_mesh: bool = False
    given: bool = False  # whether param_shardings= is
    manual: tuple[str, ...] = ()  # the axes of the shard_map
    shared: tuple[str, ...] = ()  # axis_name=
    check_vma: bool = True
    init: str = "eager"  # or "jit"
    factory: str = "muonclip"  # or "scale_by_muon"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    distribution: dict[str, Any] = dataclasses.field(default_factory=dict)
    maxima: tuple[str, Any] | None = None  # path and maximum logits of the clipped block
    maxima_spec: tuple[Entry, ...] | None = None  # None leaves them on one device

    @property
    def auto(self) -> bool:
        """Whether the compiler chooses shardings along some axis."""
        return any(k == "Auto" and n > 1 and name not in self.manual for name, n, k in self.mesh)

    @property
    def hidden(self) -> bool:
        """Whether shardings cannot be known while tracing."""
        return self.auto and not self.given and self.mode != "eager"


def draw_case(seed: int) -> Case:
    """Draws the case of a seed."""
    rng = random.Random(seed)
    case = Case(seed, x64=rng.random() < 0.2, factory=rng.choice(("muonclip", "scale_by_muon")))
    case.leaves, case.maxima = _tree(rng, case.x64)
    tables = OPTIONS | OPTIONS_OF[case.factory]
    if case.factory == "scale_by_muon":
        case.leaves = [leaf for leaf in case.leaves if leaf.dims]
        case.maxima = None
    else:
        case.maxima = case.maxima if rng.random() < 0.8 else None
        tables |= OPTIONS_OF["clip"] if case.maxima else {"qk_clip_threshold": (None,)}
    case.options = {name: rng.choice(values) for name, values in tables.items()}
    if case.x64 and case.options["ns_dtype"] is None and rng.random() < 0.2:
        case.options["ns_dtype"] = "float64"
    # The first rows of "minimax4" are steep beyond 1, and the library scales them in float32.
    if case.options["ns_coeffs"] != "minimax4":
        case.options["ns_steps"] = rng.choice((1, 2))
    case.mesh, case.mode = _mesh(rng)
    if case.mesh:
        _share(rng, case)
    return case


def _share(rng: random.Random, case: Case) -> None:
    """Draws where the arrays of a case are on its mesh, and what the library is told of it."""
    names = [name for name, _, _ in case.mesh]
    case.set_mesh = case.mode != "shard_map" and rng.random() < 0.5
    explicit = any(kind == "Explicit" for _, _, kind in case.mesh)
    # Without set_mesh neither optax.adam's init nor a jit of it can know the devices.
    case.init = rng.choice(("eager", "eager" if explicit and not case.set_mesh else "jit"))
    tables = _DISTRIBUTION | {"axes": (_some(rng, names, 0.6),)}
    case.distribution = {name: rng.choice(x) for name, x in tables.items() if rng.random() < 0.25}
    if case.mode == "shard_map":
        case.manual = rng.choice((_some(rng, names, 0.5), ())) or tuple(names)
        case.shared = _some(rng, case.manual, 0.75)
        case.check_vma = rng.random() < 0.5
        if "shard_momentum" in case.distribution:
            # Outside of the shard_map `init` would shard the momentum over its axes, too.
            case.init = "jit"
    case.given = len(case.manual) < len(names) and rng.random() < 0.7
    for leaf in case.leaves:
        if rng.random() < 0.75:
            leaf.spec = _spec(rng, leaf, case)
    if case.maxima is not None and rng.random() < 0.8:
        *layers, heads = np.shape(case.maxima[1])
        name, size, _ = rng.choice(case.mesh)
        by_head = case.mode != "shard_map" and heads % size == 0 and rng.random() < 0.4
        case.maxima_spec = (*[None] * len(layers), name) if by_head else ()


def _weighted(rng: random.Random, table: Mapping[str, float]) -> str:
    return rng.choices(list(table), list(table.values()))[0]


def _some(rng: random.Random, names: Any, probability: float) -> tuple[str, ...]:
    return tuple(name for name in names if rng.random() < probability)


def _tree(rng: random.Random, x64: bool) -> tuple[list[Leaf], tuple[str, Any] | None]:
    """Returns two to eight leaves, and path and maxima of an attention block if there is one."""
    wide = {"float64": 6, "float32": 3, "bfloat16": 1}
    dtype = _weighted(rng, wide if x64 else {"float32": 7, "bfloat16": 2.5, "float16": 0.5})
    count = rng.choices(range(2, 9), (6, 3, 1.5, 0.5, 0.4, 0.3, 0.3))[0]
    kinds = {"dense": 6, "attention": 3, "stack": 3, "twin": 2, "vector": 1.5, "fused": 1}
    kinds |= {"experts": 1, "interleaved": 0.6}
    leaves: list[Leaf] = []
    maxima = None
    while len(leaves) < count or not any(leaf.dims for leaf in leaves):
        kind, number = _weighted(rng, kinds), len(leaves)
        if kind == "attention":
            if maxima is None:
                block, maxima = _attention(rng, count - number)
                leaves += block
        elif kind != "twin":
            leaves.append(_leaf(rng, kind, number))
        elif leaves and "attention" not in leaves[-1].path:
            # Leaves of one shape share a stack.
            path = re.sub(r"_\d+/", f"_{number}/", leaves[-1].path)
            leaves.append(dataclasses.replace(leaves[-1], path=path))
    for leaf in leaves:
        leaf.dtype = rng.choice(("float32", "bfloat16")) if rng.random() < 0.08 else dtype
    return leaves, maxima


def _leaf(rng: random.Random, kind: str, number: int) -> Leaf:
    # Sizes that meshes divide, and sizes that they do not.
    even, odd = (8, 16, 24), (1, 2, 3, 4, 5, 6, 7, 12, 13)
    rows, columns = (rng.choice(even if rng.random() < 0.6 else odd) for _ in range(2))
    layers, experts = rng.choice((1, 2, 3, 4, 5, 8)), rng.choice((2, 4))
    parts = rng.choice(((columns,) * 3, (columns, 4, 4)))
    view = (rng.choice((2, 3, 4)), 3, rng.choice((2, 4, 5)))
    plain, prefix, fused = ((0,), (1,)), f"layers_{number}", f"fused_{number}/kernel"
    return {
        "dense": Leaf(f"mlp_{number}/kernel", (rows, columns), plain),
        "vector": Leaf(f"norm_{number}/scale", (rows,)),
        "stack": Leaf(f"{prefix}/kernel", (layers, rows, columns), ((1,), (2,))),
        "experts": Leaf(f"{prefix}/kernel", (layers, experts, rows, columns), ((2,), (3,))),
        "fused": Leaf(fused, (rows, sum(parts)), plain, (1, parts, None, 0)),
        "interleaved": Leaf(fused, (rows, math.prod(view)), plain, (1, (1, 1, 1), view, 1)),
    }[kind]


def _attention(rng: random.Random, room: int) -> tuple[list[Leaf], tuple[str, Any]]:
    layers = (rng.choice((2, 3, 4)),) if rng.random() < 0.4 else ()
    width, heads, size = (rng.choice(x) for x in ((7, 8, 12, 16), (2, 4, 8), (2, 4, 5)))
    key_heads = rng.choice((1, 2)) if rng.random() < 0.3 else heads
    block, at = "layers/attention" if layers else "attention", len(layers)
    inwards, outwards = ((at,), (at + 1, at + 2)), ((at, at + 1), (at + 2,))
    found: dict[str, tuple[tuple[int, ...], Any]] = {
        "query/kernel": ((width, heads, size), inwards),
        "key/kernel": ((width, key_heads, size), inwards),
    }
    if room >= 4 and rng.random() < 0.4:
        found |= {"query/bias": ((heads, size), None), "key/bias": ((key_heads, size), None)}
    elif room >= 4:
        found["value/kernel"] = ((width, key_heads, size), inwards)
        found["out/kernel"] = ((heads, size, width), outwards)
    leaves = [Leaf(f"{block}/{name}", (*layers, *x), dims) for name, (x, dims) in found.items()]
    count = math.prod(layers) * heads
    maxima = np.array(rng.choices((50.0, 90.0, 101.0, 150.0, 400.0), k=count))
    if rng.random() < 0.1:
        maxima[0] = rng.choice((math.nan, math.inf, -1.0, 0.0))
    return leaves, (block, maxima.reshape(*layers, heads).tolist())


def _mesh(rng: random.Random) -> tuple[tuple[Axis, ...], str]:
    mode = _weighted(rng, {"jit": 6, "eager": 1.2, "shard_map": 2})
    if rng.random() < 0.08 and mode != "shard_map":
        return (), mode
    devices, count = rng.choice((1, 1, 2, 4, 8, 8, 8, 8)), rng.choices((1, 2, 3), (3, 5, 2))[0]
    # Often all devices are along one axis: a run without tensor parallelism has it at size one.
    sizes, growing = [1] * count, range(count) if rng.random() < 0.65 else (count - 1,)
    while math.prod(sizes) < devices:
        sizes[rng.choice(growing)] *= 2
    kinds = rng.choice((("Auto",), ("Auto",), ("Explicit",), ("Explicit",), ("Auto", "Explicit")))
    rng.shuffle(sizes)
    axes = zip(rng.sample(("data", "fsdp", "tp"), count), sizes, strict=True)
    return tuple((name, size, rng.choice(kinds)) for name, size in axes), mode


def _spec(rng: random.Random, leaf: Leaf, case: Case) -> tuple[Entry, ...]:
    """Draws a leaf's PartitionSpec: what divides evenly, as JAX demands.

    Axes of a `shard_map` shard dimensions that count matrices alone: a device has whole matrices.
    Along shared axes all devices have the same.
    """
    entries: list[list[str]] = [[] for _ in leaf.shape]
    left = list(leaf.shape)
    for name, size, _ in rng.sample(case.mesh, len(case.mesh)):
        allowed = range(len(left))
        if name in case.manual:
            allowed = () if name in case.shared or "attention" in leaf.path else leaf.batch
        fitting = [i for i in allowed if left[i] % size == 0]
        if fitting and rng.random() < 0.7:
            at = rng.choice(fitting)
            entries[at].append(name)
            left[at] //= size
    spec: list[Entry] = [
        None if not names else names[0] if len(names) == 1 and rng.random() < 0.8 else tuple(names)
        for names in entries
    ]
    while spec and spec[-1] is None and rng.random() < 0.8:
        spec.pop()
    return tuple(spec)
