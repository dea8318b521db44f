"""Random configurations: a tree, a mesh, shardings, options and the way that the update is called.

A case is plain data, so that it can be printed as a program and simplified field by field.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Axis sizes that meshes divide, and sizes that they do not.
EVEN = (8, 16, 24)
AWKWARD = (2, 3, 4, 5, 6, 7, 12, 13)
MESH_NAMES = ("data", "fsdp", "tp")

Entry = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter.

    Attributes:
        kind: What it is, for the statistics and the rules.
        path: Its path.
        shape: Its shape.
        dtype: Its dtype.
        dims: Axes of rows and of columns; None is a leaf that Adam trains.
        split: Arguments of `Split`: axis, sizes, view, along; None is one matrix.
        spec: The mesh axes of each dimension.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[tuple[int, ...], tuple[int, ...]] | None
    split: tuple[int, tuple[int, ...], tuple[int, ...] | None, int] | None = None
    spec: tuple[Entry, ...] = ()

    @property
    def batch(self) -> tuple[int, ...]:
        """Dimensions that count matrices."""
        if self.dims is None:
            return ()
        return tuple(i for i in range(len(self.shape)) if i not in self.dims[0] + self.dims[1])


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; `programs.py` writes it as Python.

    Attributes:
        seed: Of the arrays.
        leaves: The tree.
        x64: Whether 64-bit types are on.
        mesh: `(name, size, "Auto" or "Explicit")` of every axis; () is one device without a mesh.
        mode: "jit", "eager", "shard_map" or "pmap".
        set_mesh: Whether `jax.set_mesh` is active.
        given: Whether `param_shardings=` is given.
        manual: The axes of the `shard_map`.
        shared: The axes given as `axis_name=`.
        check_vma: The argument of `shard_map`.
        init: "eager", "jit", or "abstract" where `init` is also called on shapes.
        factory: The public function that builds the transformation.
        options: Its arguments.
        distribution: The arguments of `Distribution`.
        with_rules: Whether every leaf has a rule; else the names decide.
        maxima: The maximum logits of the attention block.
        maxima_spec: The mesh axes of their dimensions; None leaves them on one device.
        gradient: Whether the gradient through the update is compared in place of the updates.
    """

    seed: int
    leaves: tuple[Leaf, ...]
    x64: bool = False
    mesh: tuple[tuple[str, int, str], ...] = ()
    mode: str = "jit"
    set_mesh: bool = False
    given: bool = False
    manual: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    check_vma: bool = True
    init: str = "eager"
    factory: str = "muonclip"
    options: tuple[tuple[str, Any], ...] = ()
    distribution: tuple[tuple[str, Any], ...] = ()
    with_rules: bool = True
    maxima: tuple[Any, ...] | None = None
    maxima_spec: tuple[Entry, ...] | None = None
    gradient: bool = False

    @property
    def option(self) -> dict[str, Any]:
        """The options as a dict."""
        return dict(self.options)

    @property
    def devices(self) -> int:
        """How many devices the case uses."""
        return math.prod(size for _, size, _ in self.mesh)

    @property
    def hidden(self) -> bool:
        """Whether shardings cannot be known while tracing, so that the compiler chooses some."""
        seen = self.given or self.mode not in ("jit", "shard_map")
        return not seen and any(
            size > 1 and kind == "Auto" and name not in self.manual
            for name, size, kind in self.mesh
        )

    def drawn(self) -> list[str]:
        """What the statistics count."""
        kinds = {kind for _, size, kind in self.mesh}
        mesh = "none" if not self.mesh else kinds.pop() if len(kinds) == 1 else "mixed"
        return [
            f"mode={self.mode}{' partly manual' * self.partly}",
            f"devices={self.devices}",
            f"mesh axes={len(self.mesh)}",
            f"axis types={mesh}",
            f"set_mesh={self.set_mesh}",
            f"factory={self.factory}",
            f"init={self.init}",
            f"x64={self.x64}",
            f"param_shardings={self.given}",
            f"gradient={self.gradient}",
            f"clip={self.maxima is not None}",
            f"leaves={len(self.leaves)}",
            *{f"leaf={leaf.kind}" for leaf in self.leaves},
            *{f"dtype={leaf.dtype}" for leaf in self.leaves},
            *(f"{name}={value!r}" for name, value in self.options),
            *(f"distribution.{name}" for name, _ in self.distribution),
        ]

    @property
    def partly(self) -> bool:
        """Whether a `shard_map` leaves axes to the compiler."""
        return self.mode == "shard_map" and len(self.manual) < len(self.mesh)


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choice(self, *values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def weighted(self, table: dict[Any, float]) -> Any:
        weights = np.array(list(table.values()))
        return list(table)[int(self.rng.choice(len(table), p=weights / weights.sum()))]

    def some(self, values: Sequence[Any], probability: float) -> tuple[Any, ...]:
        return tuple(value for value in values if self.chance(probability))

    def shuffled(self, values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in self.rng.permutation(len(values))]

    def size(self) -> int:
        return int(self.choice(*EVEN)) if self.chance(0.6) else int(self.choice(*AWKWARD))


def draw_case(seed: int) -> Case:
    """Draws the case of a seed."""
    draw = Draw(seed)
    x64 = draw.chance(0.2)
    leaves, maxima = _tree(draw, x64)
    mesh, mode = _mesh(draw)
    factory = draw.weighted({"muonclip": 5, "scale_by_muon": 4, "muon": 1.5, "apply_qk_clip": 0.7})
    if factory == "apply_qk_clip" and (maxima is None or mode in ("pmap", "shard_map")):
        factory = "muonclip"
    if factory == "scale_by_muon":
        leaves = tuple(leaf for leaf in leaves if leaf.dims) or (_dense(draw, "float32", 0),)
    if factory not in ("muonclip", "apply_qk_clip") or draw.chance(0.2):
        maxima = None if factory != "apply_qk_clip" else maxima
    manual, shared = _manual(draw, mesh, mode)
    leaves = tuple(_placed(draw, leaf, mesh, manual, mode) for leaf in leaves)
    named = factory == "muonclip" and all(leaf.kind != "fused" for leaf in leaves)
    auto = any(kind == "Auto" for name, _, kind in mesh if name not in manual)
    rest = mode in ("jit", "eager") or (mode == "shard_map" and len(manual) < len(mesh))
    case = Case(
        seed=seed,
        leaves=leaves,
        x64=x64,
        mesh=mesh,
        mode=mode,
        set_mesh=bool(mesh) and mode in ("jit", "eager") and draw.chance(0.5),
        given=bool(mesh) and rest and draw.chance(0.85 if auto else 0.25),
        manual=manual,
        shared=shared,
        check_vma=draw.chance(0.5),
        init=draw.weighted({"eager": 6, "jit": 2, "abstract": 2}),
        factory=factory,
        options=_options(draw, factory, x64, maxima is not None),
        with_rules=not named or draw.chance(0.75),
        maxima=maxima,
        gradient=mode in ("jit", "eager") and factory != "apply_qk_clip" and draw.chance(0.1),
    )
    names = tuple(name for name, _, _ in mesh)
    if case.factory != "apply_qk_clip" and names and draw.chance(0.5):
        case = dataclasses.replace(case, distribution=_distribution(draw, names))
    explicit = any(kind == "Explicit" and size > 1 for _, size, kind in mesh)
    if case.gradient or mode == "pmap" or (case.init == "jit" and explicit and not case.set_mesh):
        # The last: without a mesh `jax.jit(optax.adam(1.0).init)` fails, too.
        case = dataclasses.replace(case, init="eager")
    if mode == "shard_map" and ("shard_momentum", True) in case.distribution:
        # Outside of the shard_map `init` would shard the momentum over its axes, too.
        case = dataclasses.replace(case, init="jit")
    return dataclasses.replace(case, maxima_spec=_maxima_spec(draw, case))


# The tree.


def _tree(draw: Draw, x64: bool) -> tuple[tuple[Leaf, ...], tuple[Any, ...] | None]:
    dtype = draw.weighted(
        {"float64": 6, "float32": 3, "bfloat16": 1}
        if x64
        else {"float32": 7, "bfloat16": 2.5, "float16": 0.5}
    )
    count = draw.weighted({2: 6, 3: 3, 4: 1.5, 5: 0.5, 6: 0.4, 7: 0.3, 8: 0.3})
    leaves: list[Leaf] = []
    maxima = None
    kinds = {
        "dense": 5,
        "attention": 3,
        "stack": 2,
        "experts": 1.5,
        "fused": 1.5,
        "conv": 1,
        "vector": 1.5,
        "row": 1,
        "twin": 2,
    }
    while len(leaves) < count:
        kind = draw.weighted(kinds)
        own = draw.choice("float32", "bfloat16") if draw.chance(0.08) else dtype
        if kind == "attention":
            if maxima is None:
                block, maxima = _attention(draw, own, count - len(leaves))
                leaves += block
        elif kind == "twin":
            # A second leaf of a shape shares its stack.
            if leaves and leaves[-1].kind in ("dense", "stack", "experts", "conv", "fused"):
                last = leaves[-1]
                head, _, tail = last.path.partition("/")
                path = f"{head.rpartition('_')[0]}_{len(leaves)}/{tail}"
                leaves.append(dataclasses.replace(last, path=path))
        else:
            leaves.append(_MAKERS[kind](draw, own, len(leaves)))
    if all(leaf.dims is None for leaf in leaves):
        leaves.append(_dense(draw, dtype, len(leaves)))
    return tuple(leaves), maxima


def _dense(draw: Draw, dtype: str, number: int) -> Leaf:
    return Leaf("dense", f"mlp_{number}/kernel", (draw.size(), draw.size()), dtype, ((0,), (1,)))


def _row(draw: Draw, dtype: str, number: int) -> Leaf:
    shape = (1, draw.size()) if draw.chance(0.5) else (draw.size(), 1)
    return Leaf("row", f"row_{number}/kernel", shape, dtype, ((0,), (1,)))


def _stack(draw: Draw, dtype: str, number: int) -> Leaf:
    shape = (draw.choice(1, 2, 3, 4, 8), draw.size(), draw.size())
    return Leaf("stack", f"layers_{number}/dense/kernel", shape, dtype, ((1,), (2,)))


def _experts(draw: Draw, dtype: str, number: int) -> Leaf:
    path = f"moe_{number}/experts/kernel"
    experts, sizes = draw.choice(2, 4, 5, 8), (draw.size(), draw.size())
    if draw.chance(0.5):
        return Leaf("experts", path, (experts, *sizes), dtype, ((1,), (2,)))
    shape = (draw.choice(2, 3, 4), draw.choice(2, 4), *sizes)
    return Leaf("experts", f"layers_{number}/{path}", shape, dtype, ((2,), (3,)))


def _fused(draw: Draw, dtype: str, number: int) -> Leaf:
    rows, path = draw.size(), f"fused_{number}/kernel"
    if draw.chance(0.4):
        view = (draw.choice(2, 4, 3), 3, draw.choice(2, 4, 5))
        split = (1, (1, 1, 1), view, 1)
        return Leaf("fused", path, (rows, math.prod(view)), dtype, ((0,), (1,)), split)
    sizes = (draw.size(),) * 3 if draw.chance(0.5) else (draw.size(), 4, 4)
    return Leaf("fused", path, (rows, sum(sizes)), dtype, ((0,), (1,)), (1, sizes, None, 0))


def _conv(draw: Draw, dtype: str, number: int) -> Leaf:
    shape = (3, 2, draw.choice(2, 4, 8), draw.size())
    return Leaf("conv", f"conv_{number}/kernel", shape, dtype, ((0, 1, 2), (3,)))


def _vector(draw: Draw, dtype: str, number: int) -> Leaf:
    return Leaf("vector", f"norm_{number}/scale", (draw.size(),), dtype, None)


_MAKERS = {
    "dense": _dense,
    "row": _row,
    "stack": _stack,
    "experts": _experts,
    "fused": _fused,
    "conv": _conv,
    "vector": _vector,
}


def _attention(draw: Draw, dtype: str, room: int) -> tuple[list[Leaf], tuple[Any, ...]]:
    layers = (draw.choice(2, 3, 4),) if draw.chance(0.4) else ()
    width, heads, size = draw.choice(7, 8, 12, 16), draw.choice(2, 4, 8), draw.choice(2, 4, 5)
    kv_heads = draw.choice(1, 2) if draw.chance(0.3) else heads
    prefix = "layers/attention" if layers else "attention"
    at = len(layers)
    inwards, outwards = ((at,), (at + 1, at + 2)), ((at, at + 1), (at + 2,))

    def kernel(name: str, count: int) -> Leaf:
        shape = (*layers, width, count, size)
        return Leaf("attention", f"{prefix}/{name}/kernel", shape, dtype, inwards)

    def bias(name: str, count: int) -> Leaf:
        return Leaf("bias", f"{prefix}/{name}/bias", (*layers, count, size), dtype, None)

    block = [kernel("query", heads), kernel("key", kv_heads)]
    others = [
        kernel("value", kv_heads),
        Leaf("attention", f"{prefix}/out/kernel", (*layers, heads, size, width), dtype, outwards),
    ]
    if room >= 4:
        block += [bias("query", heads), bias("key", kv_heads)] if draw.chance(0.4) else others
    shape = (*layers, heads)
    values = [draw.choice(50.0, 90.0, 101.0, 150.0, 400.0) for _ in range(math.prod(shape))]
    if draw.chance(0.1):
        values[0] = draw.choice(math.nan, math.inf, -1.0, 0.0)
    nested: Any = values
    if layers:
        nested = [values[i : i + heads] for i in range(0, len(values), heads)]
    return block, (f"{prefix}", nested)


# The mesh, and where the leaves lie.


def _mesh(draw: Draw) -> tuple[tuple[tuple[str, int, str], ...], str]:
    if draw.chance(0.08):
        return (), draw.choice("jit", "jit", "eager")
    mode = draw.weighted({"jit": 6, "eager": 1.2, "shard_map": 2, "pmap": 0.5})
    devices = draw.weighted({1: 2, 2: 1.5, 4: 1.5, 8: 5})
    if mode == "pmap":
        return (("batch", devices, "Auto"),), mode
    count = draw.weighted({1: 3, 2: 5, 3: 2})
    sizes = [1] * count
    left = devices
    while left > 1:
        sizes[int(draw.rng.integers(count))] *= 2
        left //= 2
    kinds = draw.weighted({"Auto": 4, "Explicit": 4, "mixed": 3})
    names = draw.shuffled(MESH_NAMES)[:count]
    types = [draw.choice("Auto", "Explicit") if kinds == "mixed" else kinds for _ in sizes]
    return tuple(zip(names, sizes, types, strict=True)), mode


def _manual(
    draw: Draw, mesh: tuple[tuple[str, int, str], ...], mode: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of a `shard_map`, and those of them along which gradients are equal."""
    names = tuple(name for name, _, _ in mesh)
    if mode == "pmap":
        return names, names if draw.chance(0.8) else ()
    if mode != "shard_map":
        return (), ()
    manual = names
    if len(names) > 1 and draw.chance(0.6):
        manual = draw.some(names, 0.5) or names[:1]
    return manual, draw.some(manual, 0.7)


def _placed(
    draw: Draw,
    leaf: Leaf,
    mesh: tuple[tuple[str, int, str], ...],
    manual: tuple[str, ...],
    mode: str,
) -> Leaf:
    """Draws the leaf's PartitionSpec: what divides evenly, as JAX demands.

    Axes of a `shard_map` shard dimensions that count matrices alone: a device has whole matrices.
    """
    if mode == "pmap" or draw.chance(0.25):
        return leaf
    entries: list[list[str]] = [[] for _ in leaf.shape]
    left = list(leaf.shape)
    for name, size, _ in draw.shuffled(mesh):
        allowed = range(len(left))
        if name in manual:
            if leaf.kind in ("attention", "bias"):
                continue
            allowed = leaf.batch
        fitting = [i for i in allowed if left[i] % size == 0]
        if fitting and draw.chance(0.7):
            at = draw.choice(*fitting)
            entries[at].append(name)
            left[at] //= size
    spec: list[Entry] = [
        None if not names else names[0] if len(names) == 1 and draw.chance(0.8) else tuple(names)
        for names in entries
    ]
    while spec and spec[-1] is None and draw.chance(0.8):
        spec.pop()
    return dataclasses.replace(leaf, spec=tuple(spec))


def _maxima_spec(draw: Draw, case: Case) -> tuple[Entry, ...] | None:
    if case.maxima is None or not case.mesh or case.mode == "pmap" or draw.chance(0.2):
        return None
    if case.mode == "shard_map" or draw.chance(0.6):
        return ()
    shape = np.shape(case.maxima[1])
    name, size, _ = draw.choice(*case.mesh)
    return (*[None] * (len(shape) - 1), name) if shape[-1] % size == 0 else ()


# The options.


def _options(draw: Draw, factory: str, x64: bool, clip: bool) -> tuple[tuple[str, Any], ...]:
    if factory == "apply_qk_clip":
        return tuple(_clip_options(draw, "").items())
    options: dict[str, Any] = _coefficients(draw, factory)
    options["ns_method"] = draw.weighted({"auto": 4, "standard": 3, "gram": 2, "svd": 0.7})
    narrow = {None: 16, "float32": 2, "bfloat16": 0.7, "float16": 0.7, "float64": 3 * x64}
    options["ns_dtype"] = draw.weighted(narrow)
    options["beta"] = draw.choice(0.95, 0.8, 0.0)
    options["nesterov"] = draw.chance(0.6)
    options["mu_dtype"] = draw.weighted({None: 8, "float32": 1, "bfloat16": 1})
    if factory == "scale_by_muon":
        options["adaptive"] = draw.chance(0.25)
        options["bias_correction"] = draw.chance(0.4)
        options["relative_eps"] = draw.chance(0.8)
        return tuple(options.items())
    options["learning_rate"] = draw.choice(0.1, "optax.linear_schedule(0.1, 0.05, 2)")
    options["weight_decay"] = draw.choice(0.0, 0.3)
    options["consistent_rms"] = draw.choice(0.2, None)
    options["weight_decay_mask"] = draw.weighted({None: 7, "tree": 1, "function": 1})
    if factory == "muon":
        options["adaptive"] = draw.chance(0.25)
    elif clip:
        options |= _clip_options(draw, "qk_clip_")
    else:
        options["qk_clip_threshold"] = None
    return tuple(options.items())


def _clip_options(draw: Draw, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}threshold": draw.choice(100.0, 60.0),
        f"{prefix}alpha": draw.choice(0.5, 0.25, 1.0),
        f"{prefix}shared_keys": draw.weighted({"query": 3, "group": 1, "balanced": 1}),
    }


def _coefficients(draw: Draw, factory: str) -> dict[str, Any]:
    """Mostly few steps: they show what many do, and compile faster."""
    coefficients = draw.weighted(
        {
            "keller_jordan": 4,
            "minimax4": 3,
            "triple": 2,
            "you": 1,
            "turbo": 1,
        }
    )
    if coefficients == "triple":
        return {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": draw.choice(1, 2)}
    options: dict[str, Any] = {"ns_coeffs": coefficients}
    if draw.chance(0.7) and (factory != "muon" or coefficients == "keller_jordan"):
        options["ns_steps"] = draw.choice(1, 2, 3)
    if coefficients != "turbo" and draw.chance(0.25):
        options["preconditioning"] = draw.choice(
            "frobenius", "spectral", "aol", "schatten", "schatten8"
        )
    return options


def _distribution(draw: Draw, names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    options: dict[str, Any] = {}
    if draw.chance(0.3):
        options["axes"] = draw.some(names, 0.6)
    if draw.chance(0.3):
        options["max_matrix_bytes"] = draw.choice(64, 400, 1500)
    if draw.chance(0.3):
        options["max_stack_bytes"] = draw.choice(1, 1000, 4000)
    if draw.chance(0.4):
        options["flops_per_byte"] = draw.choice(0.0, 1.0, "inf")
    if draw.chance(0.5):
        options["shard_momentum"] = True
    return tuple(options.items())
