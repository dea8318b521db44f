"""Executes a case: two updates on one device, and the same two as the case asks for them."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.fuzz.draw import Case, Leaf

Step = Callable[..., Any]


class Run(NamedTuple):
    """Parameters and state before two updates, what these leave, and how often they were traced."""

    params: Any
    initial: Any
    result: tuple[Any, Any, Any]  # first updates, second updates, state
    traces: int


def tree_of(case: Case, value: Callable[[Leaf], Any]) -> Any:
    """A value for every leaf of a case, in its tree."""
    return unflatten_dict({leaf.path: value(leaf) for leaf in case.leaves}, sep="/")


def draw_arrays(case: Case) -> list[Any]:
    """Parameters and two gradients."""
    rng = np.random.default_rng(case.seed)
    leaves = tree_of(case, lambda leaf: leaf)
    array = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return [jax.tree.map(array, leaves) for _ in range(3)]


def one_device(case: Case, *draws: list[Any]) -> list[Any]:
    """The results of some arrays without a mesh."""
    tx = _transformation(case, {})
    step = jax.jit(_step(tx, []))
    return [_two_updates(step, tx.init(drawn[0]), drawn, _maxima(case)) for drawn in draws]


def as_asked(case: Case, drawn: list[Any], tx: Any = None) -> Run:
    """The updates as the case asks, by another transformation where one is given."""
    extra, mesh, arguments = _maxima(case), None, {}
    if case.mesh:
        names, sizes, kinds = zip(*case.mesh, strict=True)
        types = tuple(getattr(AxisType, kind) for kind in kinds)
        devices = jax.devices()[: math.prod(sizes)]
        mesh = jax.make_mesh(sizes, names, axis_types=types, devices=devices)
        places = tree_of(case, lambda leaf: NamedSharding(mesh, P(*leaf.spec)))
        drawn = [jax.device_put(tree, places) for tree in drawn]
        if case.maxima_spec is not None:
            extra = jax.device_put(extra, NamedSharding(mesh, P(*case.maxima_spec)))
        arguments |= {"param_shardings": places} if case.given else {}
        arguments |= {"axis_name": case.shared} if case.shared else {}
        given = case.distribution
        arguments |= {"distribution": mc.Distribution(**given)} if given else {}
    with jax.set_mesh(mesh) if mesh and case.set_mesh else contextlib.nullcontext():
        tx = _transformation(case, arguments) if tx is None else tx
        wraps: dict[str, Step] = {"jit": jax.jit, "eager": lambda step: step}
        init = jax.jit(tx.init) if case.init == "jit" else tx.init
        if case.mode == "shard_map":
            wraps["shard_map"], mapped_init = _mapped(case, tx, mesh, drawn[0])
            init = mapped_init if case.init == "jit" else tx.init
        traces, initial = [], init(drawn[0])
        result = _two_updates(wraps[case.mode](_step(tx, traces)), initial, drawn, extra)
    return Run(drawn[0], initial, result, len(traces))


def _step(tx: Any, traces: list[int]) -> Step:
    def step(gradients: Any, state: Any, params: Any, extra: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(gradients, state, params, **extra)
        return updates, state, optax.apply_updates(params, updates)

    return step


def _two_updates(step: Step, state: Any, drawn: list[Any], extra: Any) -> tuple[Any, Any, Any]:
    params, first, second = drawn
    updates, state, moved = step(first, state, params, extra)
    return updates, *step(second, state, moved, extra)[:2]


def _maxima(case: Case) -> Any:
    """The extra arguments of an update."""
    if case.maxima is None:
        return {}
    block, values = case.maxima
    return {"max_logits": {block: jnp.asarray(values)}}


def _transformation(case: Case, arguments: dict[str, Any]) -> Any:
    def spec(leaf: Leaf) -> Any:
        splits = (mc.Split(*leaf.split),) if leaf.split else ()
        return mc.MatrixSpec(leaf.dims, *splits) if leaf.dims else None

    rules = mc.MatrixRules([(f"^{leaf.path}$", spec(leaf)) for leaf in case.leaves])
    make = getattr(mc, case.factory)
    if case.factory != "scale_by_muon":
        make = functools.partial(make, optax.linear_schedule(0.125, 0.0625, 2))
    return make(**case.options, rules=rules, **arguments)


def _mapped(case: Case, tx: Any, mesh: Any, params: Any) -> tuple[Step, Step]:
    """A jitted `shard_map` of a step, and of `init`, over the manual axes of a case."""

    def part(leaf: Leaf) -> P:
        """What is said of a leaf's spec: the manual axes."""
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in leaf.spec)
        kept = (tuple(name for name in names if name in case.manual) for names in entries)
        return P(*(names or None for names in kept))

    parts = {leaf.path: part(leaf) for leaf in case.leaves}

    def spec_of(path: Any, _: Any) -> P:
        """Of parameters and moments, by the ends of their paths."""
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((spec for path, spec in parts.items() if name.endswith(path)), P())

    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(tx.init, bare)
    inside, specs = (jax.tree.map_with_path(spec_of, tree) for tree in (params, state))
    settings: Any = {"mesh": mesh, "axis_names": set(case.manual), "check_vma": case.check_vma}
    shard = functools.partial(jax.shard_map, **settings)
    ways = {"in_specs": (inside, specs, inside, P()), "out_specs": (inside, specs, inside)}
    init = shard(tx.init, in_specs=(inside,), out_specs=specs)
    return lambda step: jax.jit(shard(step, **ways)), jax.jit(init)
