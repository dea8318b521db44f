"""The case of a seed: a tree, a mesh, shardings, options and the way that the update is called."""

import dataclasses

import numpy as np

from tests.fuzz.cases import Case, Draw, Entry, Leaf
from tests.fuzz.settings import draw_distribution, draw_options
from tests.fuzz.trees import dense, draw_tree

MESH_NAMES = ("data", "fsdp", "tp")


def draw_case(seed: int) -> Case:
    """Draws the case of a seed."""
    draw = Draw(seed)
    x64 = draw.chance(0.2)
    leaves, maxima = draw_tree(draw, x64)
    mesh, mode = _mesh(draw)
    factory = draw.weighted({"muonclip": 5, "scale_by_muon": 4, "muon": 1.5, "apply_qk_clip": 0.7})
    if factory == "apply_qk_clip" and (maxima is None or mode in ("pmap", "shard_map")):
        factory = "muonclip"
    if factory == "scale_by_muon":
        leaves = tuple(leaf for leaf in leaves if leaf.dims) or (dense(draw, "float32", 0),)
    if factory not in ("muonclip", "apply_qk_clip") or draw.chance(0.2):
        maxima = None if factory != "apply_qk_clip" else maxima
    manual, shared = _manual(draw, mesh, mode)
    if mode != "pmap":
        leaves = tuple(_placed(draw, leaf, mesh, manual, shared) for leaf in leaves)
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
        options=draw_options(draw, factory, x64, maxima is not None),
        with_rules=not named or draw.chance(0.75),
        maxima=maxima,
        gradient=mode in ("jit", "eager") and factory != "apply_qk_clip" and draw.chance(0.1),
    )
    names = tuple(name for name, _, _ in mesh)
    if case.factory != "apply_qk_clip" and names and draw.chance(0.6):
        case = dataclasses.replace(case, distribution=draw_distribution(draw, names))
    explicit = any(kind == "Explicit" and size > 1 for _, size, kind in mesh)
    plain = case.gradient or mode == "pmap" or factory == "apply_qk_clip"
    if plain or (explicit and not case.set_mesh):
        # The last: without a mesh neither optax.adam's init nor a jit of it can know the devices.
        case = dataclasses.replace(case, init="eager")
    if mode == "shard_map" and ("shard_momentum", True) in case.distribution:
        # Outside of the shard_map `init` would shard the momentum over its axes, too.
        case = dataclasses.replace(case, init="jit")
    return dataclasses.replace(case, maxima_spec=_maxima_spec(draw, case))


def _mesh(draw: Draw) -> tuple[tuple[tuple[str, int, str], ...], str]:
    if draw.chance(0.08):
        return (), draw.choice("jit", "jit", "eager")
    mode = draw.weighted({"jit": 6, "eager": 1.2, "shard_map": 2, "pmap": 0.5})
    devices = draw.weighted({1: 2, 2: 1.5, 4: 1.5, 8: 5})
    if mode == "pmap":
        return (("batch", devices, "Auto"),), mode
    count = draw.weighted({1: 3, 2: 5, 3: 2})
    sizes = [1] * count
    left, at = devices, int(draw.rng.integers(count))
    # Often all devices are along one axis: a run without tensor parallelism has it at size one.
    several = draw.chance(0.65)
    while left > 1:
        sizes[int(draw.rng.integers(count)) if several else at] *= 2
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
    shared: tuple[str, ...],
) -> Leaf:
    """Draws the leaf's PartitionSpec: what divides evenly, as JAX demands.

    Axes of a `shard_map` shard dimensions that count matrices alone: a device has whole matrices.
    Along shared axes all devices have the same.
    """
    if draw.chance(0.25):
        return leaf
    entries: list[list[str]] = [[] for _ in leaf.shape]
    left = list(leaf.shape)
    for name, size, _ in draw.shuffled(mesh):
        allowed = range(len(left))
        if name in manual:
            if name in shared or leaf.kind in ("attention", "bias"):
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
