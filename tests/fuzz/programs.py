"""A case as a program: what the fuzzer executes is what it prints."""

import textwrap
from typing import Any

from tests.fuzz.cases import Case, Leaf

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
GRADIENT_CALLS = """\
def calls(tx, wrap, initial, params, first, second, extra):
    def loss(grads, state, params, weights, extra):
        traces.append(1)
        updates, _ = tx.update(grads, state, params, **extra)
        return sum(jax.tree.leaves(jax.tree.map(lambda u, w: jnp.sum(u * w), updates, weights)))
    return (wrap(jax.grad(loss))(first, initial, params, second, extra),)
"""
CLIP_CALLS = """\
def calls(clip, wrap, initial, params, first, second, extra):
    def step(params, extra):
        traces.append(1)
        return clip(params, extra["max_logits"])[0]
    return (wrap(step)(params, extra),)
"""


def standalone(case: Case, crashes: bool = False) -> str:
    """The program with its imports, to be run by itself.

    Args:
        case: The case.
        crashes: Whether it ends before there is anything to compare with one device.
    """
    x64 = ' JAX_ENABLE_X64="1",' if case.x64 else ""
    header = (
        f'import os; os.environ.update(JAX_PLATFORMS="cpu",{x64} '
        'XLA_FLAGS="--xla_force_host_platform_device_count=8")\n'
    )
    halves = (configured(case),) if crashes else (one_device(case), configured(case), COMPARE)
    body = "\n".join((setup(case), *halves))
    return header + IMPORTS + "\n".join(x for x in body.splitlines() if "traces.append" not in x)


def setup(case: Case) -> str:
    """The tree, the arrays and the function that calls the update."""
    calls = CALLS
    if case.factory == "apply_qk_clip":
        calls = CLIP_CALLS
    elif case.gradient:
        calls = GRADIENT_CALLS
    draw = (
        "lambda: jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x[0]), x[1]), LEAVES, "
        "is_leaf=lambda x: isinstance(x, tuple))"
    )
    lines = [
        f"LEAVES = {_nested(case.leaves)}",
        f"rng = np.random.default_rng({case.seed})",
        f"draw = {draw}",
        "params, first, second = draw(), draw(), draw()",
        f"extra = {_extra(case)}",
    ]
    return calls + "\n".join(lines)


def one_device(case: Case) -> str:
    """The same update without a mesh: `expected`."""
    initial = "tx.init(params)" if case.factory != "apply_qk_clip" else "None"
    return "\n".join(
        (
            f"tx = {_transformation(case, alone=True)}",
            f"expected = calls(tx, jax.jit, {initial}, params, first, second, extra)",
        )
    )


def configured(case: Case, transformation: str | None = None) -> str:
    """The update as the case asks: `actual`, and `initial`, the state before.

    Args:
        case: The case.
        transformation: Python of another transformation, such as one of Optax, to compare with.
    """
    if transformation is None:
        transformation = _transformation(case, alone=False)
    wrap, initial = _wrap(case), _initial(case)
    lines = [f"tx = {transformation}"]
    if case.mode == "shard_map":
        lines += _manual_specs(case)
    lines.append(f"initial = {initial}")
    if case.init == "abstract":
        lines.append("abstract = tx.init(jax.eval_shape(lambda x: x, params))")
    lines.append(f"actual = calls(tx, {wrap}, initial, params, first, second, extra)")
    inner = "\n".join(lines)
    if case.set_mesh:
        inner = "with jax.set_mesh(mesh):\n" + textwrap.indent(inner, "    ")
    return "\n".join((*_placement(case), inner))


def _placement(case: Case) -> list[str]:
    """Brings the arrays to where the case wants them."""
    if not case.mesh:
        return []
    if case.mode == "pmap":
        copies = f"jax.tree.map(lambda x: jnp.broadcast_to(x, ({case.devices}, *x.shape)), tree)"
        return [
            f"params, first, second, extra = ({copies} for tree in (params, first, second, extra))"
        ]
    sizes, names = (tuple(axis[i] for axis in case.mesh) for i in (1, 0))
    types = "".join(f"AxisType.{kind}, " for _, _, kind in case.mesh)
    lines = [
        f"mesh = jax.make_mesh({sizes}, {names}, axis_types=({types}), "
        f"devices=jax.devices()[:{case.devices}])",
        "on = lambda x, leaf: jax.device_put(x, NamedSharding(mesh, leaf[2]))",
        "params, first, second = "
        "(jax.tree.map(on, tree, LEAVES) for tree in (params, first, second))",
    ]
    if case.maxima_spec is not None:
        spec = _spec(case.maxima_spec)
        lines.append(f"extra = jax.device_put(extra, NamedSharding(mesh, {spec}))")
    return lines


def _pmap(case: Case, function: str) -> str:
    return f"jax.pmap({function}, axis_name='batch', devices=jax.devices()[:{case.devices}])"


def _shard_map(case: Case, function: str, specs: str) -> str:
    arguments = f"axis_names={set(case.manual)!r}, check_vma={case.check_vma}, {specs}"
    return f"jax.jit(jax.shard_map({function}, mesh=mesh, {arguments}))"


def _wrap(case: Case) -> str:
    match case.mode:
        case "jit":
            return "jax.jit"
        case "pmap":
            return f"lambda f: {_pmap(case, 'f')}"
        case "shard_map":
            ends = "in_specs=(inside, specs, inside, P()), out_specs=(inside, specs, inside)"
            return f"lambda f: {_shard_map(case, 'f', ends)}"
        case _:
            return "lambda f: f"


def _initial(case: Case) -> str:
    if case.factory == "apply_qk_clip":
        return "None"
    function = "tx.init"
    if case.mode == "pmap":
        function = _pmap(case, function)
    elif case.init == "jit":
        function = f"jax.jit({function})"
        if case.mode == "shard_map":
            function = _shard_map(case, "tx.init", "in_specs=(inside,), out_specs=specs")
    return f"{function}(params)"


def _manual_specs(case: Case) -> list[str]:
    """What a `shard_map` is told of parameters and state, by the ends of their paths."""
    specs = ", ".join(f"{leaf.path!r}: {_spec(_manual_part(case, leaf))}" for leaf in case.leaves)
    return [
        f"manual = {{{specs}}}",
        "def spec_of(path, x):",
        "    name = jax.tree_util.keystr(path, simple=True, separator='/')",
        "    return next((manual[path] for path in manual if name.endswith(path)), P())",
        "bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)",
        "like = jax.eval_shape(tx.init, bare)",
        "inside, specs = (jax.tree.map_with_path(spec_of, tree) for tree in (params, like))",
    ]


# Pieces.


def _transformation(case: Case, alone: bool) -> str:
    if case.factory == "apply_qk_clip":
        return f"lambda *arrays: mc.apply_qk_clip(*arrays, {_arguments(case, [])})"
    extra = []
    if not alone and case.given:
        extra.append("param_shardings=jax.tree.map(lambda x: x.sharding, params)")
    if not alone and case.shared:
        extra.append(f"axis_name={case.shared!r}")
    if not alone and case.distribution:
        inside = ", ".join(
            f"{name}=float('inf')" if value == "inf" else f"{name}={value!r}"
            for name, value in case.distribution
        )
        extra.append(f"distribution=mc.Distribution({inside})")
    return f"mc.{case.factory}({_arguments(case, extra)})"


#: Arguments that say nothing new.
_DEFAULTS: dict[str, Any] = {
    "preconditioning": None,
    "ns_method": "auto",
    "ns_dtype": None,
    "beta": 0.95,
    "nesterov": True,
    "mu_dtype": None,
    "adaptive": False,
    "bias_correction": False,
    "relative_eps": True,
    "weight_decay_mask": None,
}
_MASK = "jax.tree.map(lambda x: len(x.shape) > 1, {})"


def _arguments(case: Case, extra: list[str]) -> str:
    written = []
    for name, value in case.options:
        if name in _DEFAULTS and value == _DEFAULTS[name]:
            continue
        if name == "weight_decay_mask" and value is not None:
            text = _MASK.format("LEAVES")
            if value == "tree":
                text = (
                    "jax.tree.map(lambda x: len(x[0]) > 1, LEAVES, "
                    "is_leaf=lambda x: isinstance(x, tuple))"
                )
            else:
                text = "lambda tree: " + _MASK.format("tree")
        elif name == "learning_rate" and isinstance(value, str):
            text = value
        else:
            text = repr(value)
        written.append(f"{name}={text}")
    if case.with_rules and case.factory != "apply_qk_clip":
        rules = ", ".join(f"('^{leaf.path}$', {_matrix_spec(leaf)})" for leaf in case.leaves)
        written.append(f"rules=mc.MatrixRules([{rules}])")
    return ", ".join(written + extra)


def _matrix_spec(leaf: Leaf) -> str:
    if leaf.dims is None:
        return "None"
    if leaf.split is None:
        return f"mc.MatrixSpec({leaf.dims!r})"
    return f"mc.MatrixSpec({leaf.dims!r}, mc.Split{leaf.split!r})"


def _spec(entries: tuple[Any, ...]) -> str:
    return f"P({', '.join(map(repr, entries))})"


def _manual_part(case: Case, leaf: Leaf) -> tuple[Any, ...]:
    """What the `shard_map` is told of a leaf's spec: its own axes."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in leaf.spec)
    kept = (tuple(name for name in names if name in case.manual) for names in entries)
    return tuple(names or None for names in kept)


def _described(leaf: Leaf) -> str:
    return f"({leaf.shape!r}, {leaf.dtype!r}, {_spec(leaf.spec)})"


def _nested(leaves: tuple[Leaf, ...]) -> str:
    tree: dict[str, Any] = {}
    for leaf in leaves:
        *outer, last = leaf.path.split("/")
        node = tree
        for name in outer:
            node = node.setdefault(name, {})
        node[last] = _described(leaf)
    return _written(tree)


def _written(tree: Any) -> str:
    if isinstance(tree, str):
        return tree
    return "{" + ", ".join(f"{key!r}: {_written(value)}" for key, value in tree.items()) + "}"


def _extra(case: Case) -> str:
    if case.maxima is None:
        return "{}"
    path, values = case.maxima
    text = repr(values).replace("nan", "np.nan").replace("inf", "np.inf")
    return f"{{'max_logits': {{{path!r}: jnp.asarray({text})}}}}"
