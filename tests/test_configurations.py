"""What every transformation promises, under each of JAX's own settings and on every kind of mesh.

Two steps of each row of `contract_cases.ROWS` must give what two steps elsewhere give.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.contract_cases import MATRICES, MAX_LOGITS, MODEL, ROWS, Row
from tests.helpers import TOLERANCE

every_row = pytest.mark.parametrize("name", ROWS)


class Steps(NamedTuple):
    """The state and parameters before two jitted steps, what they have left, and their traces."""

    initial: Any
    params: Any
    updates: tuple[Any, Any]
    state: Any
    traces: int


def two_steps(
    row: Row,
    tx: Any = None,
    place: Callable[[Any], Any] = lambda tree: tree,
    dtype: Any = jnp.float32,
    options: Any = None,
    second: Callable[[], Any] = contextlib.nullcontext,
) -> Steps:
    """Initialises and takes two steps, the second one under `second`."""
    tx = row.make() if tx is None else tx
    traces = []

    @functools.partial(jax.jit, compiler_options=options)
    def step(gradients: Any, state: Any, params: Any, extra: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(gradients, state, params, **extra)
        return updates, state, optax.apply_updates(params, updates)

    params, first, other = (place(row.tree(seed, dtype)) for seed in (0, 1, 2))
    extra = jax.tree.map(jnp.asarray, place(row.extra_args()))
    initial = tx.init(params)
    updates, state, moved = step(first, initial, params, extra)
    with second():
        later, state, _ = step(other, state, moved, extra)
    return Steps(initial, params, (updates, later), state, len(traces))


@functools.cache
def plain(name: str) -> Steps:
    return two_steps(ROWS[name])


def form(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def check(steps: Steps, name: str) -> None:
    """Values of the plain steps, the form of `init` and of the parameters, one trace."""
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE["float32"])
    jax.tree.map(
        lambda a, e: close(np.asarray(a, np.float64), e),
        (steps.updates, steps.state),
        (plain(name).updates, plain(name).state),
    )
    assert form(steps.state) == form(steps.initial)
    assert [form(updates) for updates in steps.updates] == [form(steps.params)] * 2
    assert steps.traces == 1


# -- JAX's settings --


@every_row
def test_numbers_are_checked_and_nothing_moves_between_host_and_devices(name: str):
    with jax.debug_nans(True), jax.debug_infs(True):
        steps = two_steps(ROWS[name], second=lambda: jax.transfer_guard("disallow"))
    check(steps, name)


@every_row
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_64_bit_mode(name: str, dtype: str):
    with jax.enable_x64(True):
        steps = two_steps(ROWS[name], dtype=dtype)
        if dtype == "bfloat16":
            # Values in 16 bits are compared where the mode is off.
            assert form(steps.state) == form(steps.initial)
            assert form(steps.updates[1]) == form(steps.params)
            return
        check(steps, name)


@every_row
def test_the_optimising_compiler(name: str):
    optimised = {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    }
    check(two_steps(ROWS[name], options=optimised), name)


def traced(row: Row) -> None:
    params, gradients, tx = row.tree(0), row.tree(1), row.make()
    state = tx.init(params)
    update = functools.partial(jax.jit(tx.update).eval_shape, **row.extra_args())
    assert form(update(gradients, state, params)) == form((params, state))


@every_row
def test_ranks_are_not_promoted_and_no_tracer_leaks(name: str):
    with jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        traced(ROWS[name])


#: What contains no Adam and no bias correction: Optax's own raise under strict promotion.
STRICT: dict[str, Row] = {
    "scale_by_muon": Row(lambda: mc.scale_by_muon(adaptive=True), {}, MATRICES),
    "qk_clip": Row(lambda: mc.qk_clip(mc.clip_until(5, 95.0), alpha=0.4), {}, MODEL, True),
    "accumulate": Row(
        lambda: mc.accumulate(
            optax.sgd(0.1),
            every=2,
            max_logits=lambda params: MAX_LOGITS,
            should_skip_update_fn=optax.skip_not_finite,
        ),
        {},
        MODEL,
        True,
    ),
    "metrics": Row(
        lambda: mc.metrics(optax.sgd(0.1), every=2, qk_clip_threshold=95.0), {}, MODEL, True
    ),
    **{name: ROWS[name] for name in ("scale_by_neuron_rms", "hyperball", "scale_by_shape")},
}


@pytest.mark.parametrize("row", STRICT.values(), ids=STRICT)
def test_strict_promotion(row: Row):
    with jax.numpy_dtype_promotion("strict"):
        traced(row)


# -- meshes --

KINDS = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}
SIZES = {1: (1, 1), 2: (2, 1), 8: (4, 2)}
#: Kind, devices, whether `jax.set_mesh` is active, whether leaves are sharded: every pair of them.
MESHES = [
    ("auto", 1, True, True),
    ("auto", 2, False, False),
    ("auto", 8, False, True),
    ("explicit", 2, True, True),
    ("explicit", 1, False, True),
    ("explicit", 8, False, False),
    ("explicit", 8, True, True),
    ("mixed", 1, False, False),
    ("mixed", 2, True, False),
    ("mixed", 8, False, True),
]
#: All meshes are for these; others are made of the same parts, or need no sharding.
EVERYWHERE = ("scale_by_muon", "muonclip", "accumulate", "metrics")
CASES = [(n, *mesh) for n in ROWS for mesh in (MESHES if n in EVERYWHERE else MESHES[2::2])]


def spec_for(shape: tuple[int, ...], sizes: tuple[int, int]) -> P:
    """Shards the first axis that the mesh's first axis divides, and the next for its second."""
    names: list[str | None] = [None] * len(shape)
    free = [("x", sizes[0]), ("y", sizes[1])]
    for axis, length in enumerate(shape):
        if free and length % free[0][1] == 0:
            names[axis] = free.pop(0)[0]
    return P(*names)


@pytest.mark.parametrize(("name", "kind", "devices", "is_set", "sharded"), CASES)
def test_meshes(name: str, kind: str, devices: int, is_set: bool, sharded: bool):
    row, sizes = ROWS[name], SIZES[devices]
    mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=KINDS[kind], devices=jax.devices()[:devices])

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.device_put(
                x, NamedSharding(mesh, spec_for(x.shape, sizes) if sharded else P())
            ),
            tree,
        )

    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        given = {}
        if kind != "explicit" and name not in ("scale_by_shape", "qk_clip", "add_weight_decay"):
            # Where axes are Auto, a tracer does not know its sharding: there it is an argument.
            given["param_shardings"] = jax.tree.map(lambda x: x.sharding, place(row.tree(0)))
        steps = two_steps(row, row.factory(**row.traced, **given), place)
    if not is_set:
        # A scalar of Adam comes without a mesh and returns with one, as from optax.adam.
        steps = steps._replace(traces=1)
    check(steps, name)

    def same_place(x: jax.Array, y: jax.Array) -> None:
        if y.committed:
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)

    jax.tree.map(same_place, steps.updates[1], steps.params)
    jax.tree.map(same_place, steps.state, steps.initial)
