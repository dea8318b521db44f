"""A tree of matrices on a mesh, beside the same tree on one device."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.hlo import tally
from muonclip_jax.routing import MatrixSpec, Split
from tests.helpers import normal_tree

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
#: Name -> shape, spec, sharding.
Leaves = dict[str, tuple[tuple[int, ...], MatrixSpec, P]]

THIRDS = Split(1, (8, 8, 8))
#: Every kind of leaf, sharded in every way.
TREE: Leaves = {
    "replicated": ((8, 16), MatrixSpec(), P()),
    "rows": ((8, 16), MatrixSpec(), P("fsdp")),
    "columns": ((8, 16), MatrixSpec(), P(None, "fsdp")),
    "rows and columns": ((8, 16), MatrixSpec(), P("tp", "fsdp")),
    "both on rows": ((8, 16), MatrixSpec(), P(("tp", "fsdp"))),
    "both on columns": ((8, 16), MatrixSpec(), P(None, ("fsdp", "tp"))),
    "tall": ((16, 8), MatrixSpec(), P("fsdp", "tp")),
    "square": ((8, 8), MatrixSpec(), P("tp", "fsdp")),
    "one row": ((1, 8), MatrixSpec(), P(None, "fsdp")),
    "query": ((8, 4, 4), MatrixSpec((0, (1, 2))), P("tp", "fsdp")),
    "inside of heads": ((8, 4, 4), MatrixSpec((0, (1, 2))), P("tp", None, "fsdp")),
    "out": ((4, 4, 8), MatrixSpec(((0, 1), 2)), P("tp", None, "fsdp")),
    "layers": ((5, 8, 12), MatrixSpec((1, 2)), P(None, "tp", "fsdp")),
    "stages": ((8, 8, 12), MatrixSpec((1, 2)), P("fsdp", "tp")),
    "experts": ((4, 4, 8, 12), MatrixSpec((2, 3)), P("fsdp", "tp")),
    "fused": ((8, 24), MatrixSpec((0, 1), THIRDS), P("fsdp", "tp")),
    "fused, other axis": ((8, 24), MatrixSpec((0, 1), THIRDS), P("fsdp")),
    "interleaved": (
        (8, 24),
        MatrixSpec((0, 1), Split(1, (1, 1, 1), view=(4, 3, 2), along=1)),
        P("tp", "fsdp"),
    ),
}


def mesh_of(*kinds: AxisType, **sizes: int) -> Mesh:
    """A mesh of the first devices; one kind is that of all axes."""
    sizes = sizes or {"fsdp": 4, "tp": 2}
    kinds = (kinds or (AUTO,)) * (1 if len(kinds) > 1 else len(sizes))
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def transformation(specs: Any, **arguments: Any) -> Any:
    # Two steps show what five do, and compile faster.
    defaults = {"ns_coeffs": "keller_jordan", "ns_steps": 2, "weight_dimension_numbers": specs}
    return mc.scale_by_muon(**{**defaults, **arguments})


def step(tx: Any, gradients: Any, state: Any) -> Any:
    return tx.update(gradients, state)[0]


@functools.cache
def on_one_device(leaves: tuple[tuple[str, tuple[int, ...], MatrixSpec], ...], arguments: Any):
    """The updates without a mesh, compiled once for all shardings of the same tree."""
    params = normal_tree({name: shape for name, shape, _ in leaves}, 0)
    tx = transformation({name: spec for name, _, spec in leaves}, **dict(arguments))
    return jax.jit(functools.partial(step, tx))(params, tx.init(params))


def same_places(actual: Any, shardings: Any) -> None:
    for (path, x), at in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(at, x.ndim), (jax.tree_util.keystr(path), x.sharding)


class Case:
    """A tree on a mesh, beside the same tree on one device."""

    def __init__(self, leaves: Leaves, mesh: Mesh | None = None):
        self.mesh = mesh or mesh_of()
        self.specs = {name: spec for name, (_, spec, _) in leaves.items()}
        self.shardings = {name: NamedSharding(self.mesh, at) for name, (*_, at) in leaves.items()}
        self.alone = normal_tree({name: shape for name, (shape, *_) in leaves.items()}, 0)
        self.params = jax.device_put(self.alone, self.shardings)

    def transformation(self, **arguments: Any) -> Any:
        return transformation(self.specs, **arguments)

    def sharded(self, **arguments: Any) -> Any:
        return self.transformation(param_shardings=self.shardings, **arguments)

    def expected(self, **arguments: Any) -> Any:
        shapes = tuple((name, x.shape, self.specs[name]) for name, x in self.alone.items())
        return on_one_device(shapes, tuple(arguments.items()))

    def check(self, updates: Any, **arguments: Any) -> None:
        for name, expected in self.expected(**arguments).items():
            np.testing.assert_allclose(updates[name], expected, atol=1e-6, rtol=0, err_msg=name)
            assert updates[name].dtype == expected.dtype
        same_places(updates, self.shardings)

    def compiled(self, tx: Any) -> tuple[Any, str]:
        """The updates, and the text of the program."""
        state = tx.init(self.params)
        program: Any = jax.jit(tx.update).lower(self.params, state).compile()
        return program(self.params, state)[0], program.as_text()

    def mapped(self, tx: Any, specs: Any, **options: Any) -> Any:
        """The program of the first step inside of a `shard_map` of the user's own."""

        def first(x: Any) -> Any:
            count, mu = jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, x)
            return tx.update(x, mc.MuonState(count, mu))[0]

        run = jax.shard_map(first, mesh=self.mesh, in_specs=(specs,), out_specs=specs, **options)
        return jax.jit(run).lower(self.params).compile()


def stack_of(count: int, at: P, *kinds: AxisType) -> Case:
    leaf = ((8, 16), MatrixSpec(), at)
    return Case({f"w{number}": leaf for number in range(count)}, mesh_of(*kinds))


def collectives(text: str, in_loops: bool | None = None) -> dict[str, int]:
    """How many collectives of each kind a program has; None: in loops or not."""
    kinds = tally(text).by_kind(in_loops)
    return {kind: int(row["count"]) for kind, row in kinds.items()}
