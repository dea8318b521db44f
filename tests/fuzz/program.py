"""A case as a program: what the fuzzer executes is what it prints."""

import math
import textwrap
from typing import Any

from tests.fuzz.draw import Case, Leaf

IMPORTS = """\
import jax, jax.numpy as jnp, numpy as np, optax, muonclip_jax as mc
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
"""
COMPARE = """\
for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
    x, y = (np.asarray(z).astype(np.float64) for z in (a, b))
    print(path, np.linalg.norm(x - y) / np.linalg.norm(y), a.dtype, a.sharding)
"""
#: How the update is called, and what is compared.
CALLS = """\
def calls(tx, wrap, initial, params, first, second, extra):
    def step(grads, state, params, extra):
        traces.append(1)
        updates, state = tx.update(grads, state, params, **extra)
        return updates, state, optax.apply_updates(params, updates)
    step = wrap(step)
    updates, state, moved = step(first, initial, params, extra)
    return updates, *step(second, state, moved, extra)[:2]
"""
SETUP = """\
LEAVES = {leaves}
rng = np.random.default_rng({seed})
leaf = lambda x: isinstance(x, tuple)
array = lambda x: jnp.asarray(rng.standard_normal(x[0]), x[1])
draw = lambda: jax.tree.map(array, LEAVES, is_leaf=leaf)
drawn = draw(), draw(), draw()
params, first, second = drawn
extra = {extra}
"""
ONE_DEVICE = """\
tx = {tx}
expected = calls(tx, jax.jit, tx.init(params), params, first, second, extra)
"""
MESH = """\
mesh = jax.make_mesh({sizes}, {names}, axis_types=({types}), devices=jax.devices()[:{devices}])
on = lambda x, leaf: jax.device_put(x, NamedSharding(mesh, leaf[2]))
params, first, second = (jax.tree.map(on, tree, LEAVES) for tree in (params, first, second))
"""
#: What a `shard_map` is told of parameters and state, by the ends of their paths.
MANUAL = """\
manual = {specs}
def spec_of(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return next((manual[path] for path in manual if name.endswith(path)), P())
bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
like = jax.eval_shape(tx.init, bare)
inside, specs = (jax.tree.map_with_path(spec_of, tree) for tree in (params, like))
shard = lambda f, **specs: jax.jit(
    jax.shard_map(f, mesh=mesh, axis_names={axes}, check_vma={check_vma}, **specs)
)
"""
WRAPS = {
    "jit": "jax.jit",
    "eager": "lambda f: f",
    "shard_map": "lambda f: shard(f, in_specs=(inside, specs, inside, P()), "
    "out_specs=(inside, specs, inside))",
}


class Text(str):
    """Python, which stands without quotes where a tree of it is printed."""

    __repr__ = str.__str__


def standalone(case: Case, crashes: bool = False) -> str:
    """The program with its imports; without one device where it `crashes`."""
    x64 = ' JAX_ENABLE_X64="1",' if case.x64 else ""
    header = (
        f'import os; os.environ.update(JAX_PLATFORMS="cpu",{x64} '
        'XLA_FLAGS="--xla_force_host_platform_device_count=8")\n'
    )
    halves = (configured(case),) if crashes else (one_device(case), configured(case), COMPARE)
    lines = "".join((setup(case), *halves)).splitlines(keepends=True)
    return header + IMPORTS + "".join(x for x in lines if "traces.append" not in x)


def setup(case: Case) -> str:
    """The tree, the arrays and the function that calls the update."""
    leaves: dict[str, Any] = {}
    for leaf in case.leaves:
        *outer, last = leaf.path.split("/")
        node = leaves
        for name in outer:
            node = node.setdefault(name, {})
        node[last] = leaf.shape, leaf.dtype, Text(f"P{leaf.spec!r}")
    extra: dict[str, Any] = {}
    if case.maxima is not None:
        values = repr(case.maxima[1]).replace("nan", "np.nan").replace("inf", "np.inf")
        extra = {"max_logits": {case.maxima[0]: Text(f"jnp.asarray({values})")}}
    return CALLS + SETUP.format(leaves=leaves, seed=case.seed, extra=extra)


def one_device(case: Case) -> str:
    """The same update without a mesh: `expected`."""
    return ONE_DEVICE.format(tx=_transformation(case, alone=True))


def configured(case: Case, transformation: str | None = None) -> str:
    """The update as the case asks: `actual`, and `initial`, the state before.

    With Python of another `transformation`, such as one of Optax, in the place of the library's.
    """
    placement, lines = "", f"tx = {transformation or _transformation(case, alone=False)}\n"
    init = "jax.jit(tx.init)" if case.init == "jit" else "tx.init"
    if case.mesh:
        names, sizes, kinds = zip(*case.mesh, strict=True)
        types = "".join(f"AxisType.{kind}, " for kind in kinds)
        placement = MESH.format(sizes=sizes, names=names, types=types, devices=math.prod(sizes))
    if case.maxima_spec is not None:
        spec = f"NamedSharding(mesh, P{case.maxima_spec!r})"
        placement += f"extra = jax.device_put(extra, {spec})\n"
    if case.mode == "shard_map":
        specs = {leaf.path: Text(f"P{_manual_part(case, leaf)!r}") for leaf in case.leaves}
        lines += MANUAL.format(specs=specs, axes=set(case.manual), check_vma=case.check_vma)
        if case.init == "jit":
            init = "shard(tx.init, in_specs=(inside,), out_specs=specs)"
    lines += f"initial = {init}(params)\n"
    wrap = WRAPS[case.mode]
    lines += f"actual = calls(tx, {wrap}, initial, params, first, second, extra)\n"
    if case.set_mesh:
        lines = "with jax.set_mesh(mesh):\n" + textwrap.indent(lines, "    ")
    return placement + lines


def _transformation(case: Case, alone: bool) -> str:
    arguments = [f"{name}={value!r}" for name, value in case.options.items()]
    if case.factory != "scale_by_muon":
        arguments.insert(0, "optax.linear_schedule(0.125, 0.0625, 2)")
    rules = ", ".join(f"('^{leaf.path}$', {_matrix_spec(leaf)})" for leaf in case.leaves)
    arguments.append(f"rules=mc.MatrixRules([{rules}])")
    if not alone and case.given:
        arguments.append("param_shardings=jax.tree.map(lambda x: x.sharding, params)")
    if not alone and case.shared:
        arguments.append(f"axis_name={case.shared!r}")
    if not alone and case.distribution:
        inside = ", ".join(f"{name}={value!r}" for name, value in case.distribution.items())
        arguments.append(f"distribution=mc.Distribution({inside})")
    return f"mc.{case.factory}({', '.join(arguments)})"


def _matrix_spec(leaf: Leaf) -> str:
    split = f", mc.Split{leaf.split!r}" if leaf.split else ""
    return f"mc.MatrixSpec({leaf.dims!r}{split})" if leaf.dims else "None"


def _manual_part(case: Case, leaf: Leaf) -> tuple[Any, ...]:
    """What the `shard_map` is told of a leaf's spec: its own axes."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in leaf.spec)
    kept = (tuple(name for name in names if name in case.manual) for names in entries)
    return tuple(names or None for names in kept)
