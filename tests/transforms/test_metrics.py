"""What `metrics` measures, held against singular values in float64, and when it does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from tests.helpers import TOLERANCE, assert_close, equations, normal_tree, update

RNG = np.random.default_rng(0)
GAUSSIAN = RNG.standard_normal((24, 40))
LOW_RANK = RNG.standard_normal((24, 3)) @ RNG.standard_normal((3, 40)) + 1e-2 * GAUSSIAN

#: Ordinary matrices and each degenerate case.
WIDE: dict[str, Any] = {
    "gaussian": GAUSSIAN,
    "low rank": LOW_RANK,
    "ill conditioned": GAUSSIAN * np.logspace(0, -6, 24)[:, None],
    "orthogonal": 3 * np.linalg.qr(GAUSSIAN.T)[0].T,
    "bfloat16": jnp.asarray(3 * np.linalg.qr(GAUSSIAN.T)[0].T, jnp.bfloat16),
    "rank one": np.outer(GAUSSIAN[:, 0], GAUSSIAN[0]),
    "one row": GAUSSIAN[:1],
    "one entry": GAUSSIAN[:1, :1],
    "tiny": 1e-30 * GAUSSIAN,
    "huge": 1e30 * GAUSSIAN,
    "complex": GAUSSIAN + 1j * LOW_RANK,
    "zero": np.zeros((3, 5)),
}
DENSE = {"dense": {"kernel": jnp.asarray(GAUSSIAN, jnp.float32)}}
SHAPES = {
    "tall": {"kernel": (12, 5)},
    "wi_0": {"kernel": (3, 5, 12)},
    "attention": {"query": {"kernel": (8, 2, 4)}, "key": {"kernel": (8, 2, 4)}},
    "fused": {"kernel": (8, 12)},
    "norm": {"scale": (8,)},
    "embedding": (6, 8),
}
RULES = mc.MatrixRules(
    [
        ("fused/kernel$", mc.MatrixSpec((0, 1), mc.Split(1, (4, 8)))),
        ("wi_0/kernel$", mc.MatrixSpec((1, 2))),
        ("one (row|entry)/kernel$", mc.MatrixSpec()),
    ]
)
UPDATES = normal_tree(SHAPES, 0) | {name: {"kernel": jnp.asarray(x)} for name, x in WIDE.items()}
#: How the leaves that are not one matrix as they are become some, by hand.
CUT: dict[str, Any] = {
    "attention/key/kernel": lambda x: [x.reshape(8, 8)],
    "attention/query/kernel": lambda x: [x.reshape(8, 8)],
    "fused/kernel": lambda x: [x[:, :4], x[:, 4:]],
    "wi_0/kernel": list,
}
NAMES = ("update_rms", "spectral_norm", "orthogonality_error", "effective_rank")


def of_singular_values(x: np.ndarray) -> tuple[float, ...]:
    """The definitions of `NAMES`, in float64."""
    s = np.linalg.svd(x, compute_uv=False)
    if not s.any():
        return 0.0, 0.0, 1.0, 0.0
    error = np.sqrt(np.mean((s**2 / np.mean(s**2) - 1) ** 2))
    return np.sqrt(np.mean(np.abs(x) ** 2)), s[0], error, np.sum(s**2) ** 2 / np.sum(s**4)


EXPECTED: dict[str, np.ndarray] = {
    path: np.array([of_singular_values(part) for part in CUT.get(path, lambda x: [x])(x)]).T
    for path, x in (
        (jax.tree_util.keystr(keys, simple=True, separator="/"), np.asarray(x, np.complex128))
        for keys, x in jax.tree.leaves_with_path(UPDATES)
    )
    if path not in ("norm/scale", "embedding")
}


@pytest.fixture(scope="module")
def figures() -> mc.MuonMetrics:
    """Of a transformation whose momentum is its update."""
    zero = jnp.zeros([], jnp.int32)
    inner = optax.GradientTransformation(
        lambda params: mc.MuonState(zero, params),
        lambda updates, state, params=None: (updates, mc.MuonState(zero, updates)),
    )
    tx = mc.metrics(inner, rules=RULES)
    _, state = jax.jit(tx.update)(UPDATES, tx.init(UPDATES))
    return mc.read_metrics(state, UPDATES, rules=RULES)


@pytest.mark.parametrize("number", range(4), ids=NAMES)
def test_figures_are_those_of_the_singular_values_of_every_matrix(figures: Any, number: int):
    found, name = getattr(figures, NAMES[number]), NAMES[number]
    assert list(found) == list(EXPECTED)
    for path, figures_of in EXPECTED.items():
        got, expected = np.float64(found[path]), figures_of[number]
        rtol = 1e-3 if path.startswith("bfloat16") else TOLERANCE["float32"]
        if name == "spectral_norm":  # the power iteration's own error; all else is rounding
            assert (got <= expected * (1 + rtol)).all()
            rtol = 5e-3
        atol = 1e-6 if name == "orthogonality_error" else 0
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=path)


def test_scalars_reduce_the_matrices_of_a_leaf_and_of_the_model(figures: Any):
    flat = {name: float(value) for name, value in figures.scalars("m").items()}
    of_layers = np.sqrt(np.mean(EXPECTED["wi_0/kernel"][0] ** 2))
    largest = max(expected[2].max() for expected in EXPECTED.values())
    np.testing.assert_allclose(flat["m/update_rms/wi_0/kernel"], of_layers, rtol=1e-5)
    np.testing.assert_allclose(flat["m/orthogonality_error"], largest, rtol=1e-5)
    assert set(figures.scalars("m", leaves=False)) == {f"m/{name}" for name in NAMES}


def test_a_sample_every_third_update_and_nothing_changes_between():
    inner = mc.muonclip(0.02, qk_clip_threshold=None)
    tx = mc.metrics(inner, every=3)

    def seven(tx: Any) -> Any:
        def step(state: Any, scale: Any) -> Any:
            grads = jax.tree.map(lambda p: p * jnp.cos(scale * jnp.arange(p.shape[-1])), DENSE)
            updates, state = tx.update(grads, state, DENSE)
            return state, (updates, getattr(state, "sample", None))

        return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(7.0)))(tx.init(DENSE))

    (state, (updates, samples)), (alone, (plain, _)) = seven(tx), seven(inner)
    assert samples["step"].tolist() == [0, 0, 0, 3, 3, 3, 6]
    for values in samples.values():
        np.testing.assert_array_equal(values, values[samples["step"]])
    assert len(set(samples["spectral_norm"][:, 0].tolist())) == 3
    assert_close((updates, state.inner_state), (plain, alone), 1e-6)


def test_between_samples_no_matrix_is_looked_at():
    tx = mc.metrics(optax.sgd(0.1), rules=RULES, qk_clip_threshold=100.0)
    params = normal_tree(SHAPES, 0)
    step = jax.make_jaxpr(lambda g, s: tx.update(g, s, max_logits={"attention": jnp.ones(2)}))
    program = list(equations(step(params, tx.init(params))))
    (cond,) = [e for e in program if e.primitive.name == "cond"]
    kept, taken = (list(equations(branch)) for branch in cond.params["branches"])
    products, inside = (
        sum(e.primitive.name in ("dot_general", "while") for e in x) for x in (program, taken)
    )
    assert not kept
    assert products == inside > 0


# -- QK-Clip --


def attention(*stack: int) -> Any:
    return {"attn": {name: {"kernel": jnp.ones((*stack, 6, 4, 2))} for name in ("query", "key")}}


ATTENTION, LARGE = attention(), {"attn": jnp.full(4, 200.0)}


def measured(tx: Any, params: Any, max_logits: Any, updates: int = 1, **how: Any) -> mc.MuonMetrics:
    """The figures after some updates."""
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(updates):
        _, state = step(params, state, params, max_logits=max_logits)
    return mc.read_metrics(state, params, **how)


def watched(every: float = 1, **settings: Any) -> Any:
    return mc.metrics(optax.sgd(0.1), every, **settings)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_maxima_and_gammas_are_those_of_qk_clip(stack: tuple[int, ...]):
    params, shape = attention(*stack), (2, 3, 4) if stack else (4,)
    max_logits = {"attn": {"max_logits": (jnp.asarray(RNG.uniform(50, 250, shape)),)}}
    rules = mc.MatrixRules(scan_axis=0)  # two kernels of one shape do not show it
    tx = mc.metrics(mc.muonclip(0.02, rules=rules), rules=rules, qk_clip_threshold=100.0)
    figures = measured(tx, params, max_logits, rules=rules)
    info = mc.qk_clip_info(params, max_logits, threshold=100.0)
    assert float(figures.max_logit["attn"]) == float(info.largest) > 100
    assert float(figures.min_gamma["attn"]) == float(info.gamma["attn"].min()) < 1
    assert int(figures.clipped_heads["attn"]) == int(info.total_clipped) > 0


def test_a_threshold_may_be_a_schedule():
    tx = watched(qk_clip_threshold=mc.clip_until(1, 100.0))
    counts = [measured(tx, ATTENTION, LARGE, n).clipped_heads["attn"] for n in (1, 2)]
    assert [int(count) for count in counts] == [4, 0]


def test_without_threshold_or_momentum_there_are_no_figures_of_them():
    figures = measured(watched(), ATTENTION, LARGE)
    assert figures.max_logit == figures.min_gamma == figures.clipped_heads == {}
    assert not any("max_logit" in name for name in figures.scalars())
    assert not figures.effective_rank["attn/key/kernel"].any()


def test_an_infinite_threshold_shows_the_maxima_of_a_model_that_cannot_be_clipped():
    # Gains that heads share: no kernel's scale reaches the logits.
    gains = {f"{name}_norm": {"scale": jnp.ones(2)} for name in ("query", "key")}
    params = {"attn": {**ATTENTION["attn"], **gains}}
    figures = measured(watched(qk_clip_threshold=jnp.inf), params, LARGE)
    assert (figures.max_logit["attn"], figures.min_gamma["attn"]) == (200.0, 1.0)
    with pytest.raises(ValueError, match="attn"):
        measured(watched(qk_clip_threshold=100.0), params, LARGE)


@pytest.mark.parametrize(
    ("maxima", "expected"),
    [
        ([200.0, 200.0, 201.0, 199.5], [0, 1, 2, 3]),  # as if nothing had been done
        ([200.0, 230.0, 190.0, 230.0], [0, 1, 0, 1]),  # a new low
        ([200.0, 100.5, 100.5, 101.0], [0, 0, 0, 0]),  # at the threshold again and again
        ([200.0, 200.0, 90.0, 200.0, 200.0], [0, 1, 0, 0, 1]),  # not clipped in between
        ([200.0, np.nan, 200.0, np.inf], [0, 0, 0, 0]),  # no number, no clip
    ],
)
def test_a_clip_without_effect_is_counted(maxima: Any, expected: list[int]):
    def counts(threshold: float) -> list[int]:
        tx = mc.metrics(optax.identity(), every=1000, qk_clip_threshold=threshold)

        def step(state: Any, x: Any) -> Any:
            _, state = tx.update(ATTENTION, state, max_logits={"attn": x})
            return state, mc.read_metrics(state, ATTENTION).clips_without_effect["attn"]

        rows = jnp.asarray(maxima, jnp.float32)[:, None] * jnp.asarray([0.1, 1.0, 0.5, -1.0])
        return jax.lax.scan(step, tx.init(ATTENTION), rows)[1].tolist()

    assert counts(100.0) == expected
    assert counts(np.inf) == [0] * len(maxima)


def test_blocks_that_are_not_selected_have_no_figures():
    params = {"encoder": ATTENTION, "decoder": ATTENTION}
    tx = watched(qk_clip_threshold=100.0, qk_clip_blocks="decoder")
    maxima = {"decoder/attn": LARGE["attn"]}
    figures = measured(tx, params, maxima, qk_clip_blocks="decoder")
    assert list(figures.max_logit) == ["decoder/attn"]
    with pytest.raises(ValueError, match=r"and 1 attention blocks, and params have 4 and 2"):
        measured(tx, params, maxima)


def test_inside_of_multi_transform_and_accumulate():
    params = {**ATTENTION, "norm": {"scale": jnp.ones(6)}}
    measured = mc.metrics(mc.scale_by_muon(), every=1, qk_clip_threshold=100.0)
    muon = optax.chain(measured, optax.scale(-0.02))
    routed = optax.multi_transform({"muon": muon, "adamw": optax.adamw(1e-3)}, mc.label_params)
    tx = mc.accumulate(routed, 2, max_logits={"attn": jnp.ones(4)})
    step, state = jax.jit(tx.update), tx.init(params)
    for scale in (100.0, 300.0, 50.0):
        _, state = step(params, state, params, max_logits={"attn": jnp.full(4, scale)})
    figures = mc.read_metrics(state, params)
    # One step was taken, with the maxima of both micro-batches; the third waits for the fourth.
    assert (int(figures.step), float(figures.max_logit["attn"])) == (0, 300.0)
    assert list(figures.update_rms) == ["attn/key/kernel", "attn/query/kernel"]


def test_in_the_optimizer_of_nnx():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = mc.metrics(mc.muonclip(0.02, qk_clip_threshold=None))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    figures = mc.read_metrics(optimizer.opt_state, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(figures.effective_rank["kernel"], [1.0], rtol=TOLERANCE["float32"])


def test_inside_of_shard_map():
    tx = mc.metrics(mc.scale_by_muon(), every=1)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(state: Any, batch: jax.Array) -> Any:
        gradients = jax.tree.map(lambda p: jax.lax.pmean(p * batch.sum(), "batch"), DENSE)
        return update(tx, gradients, state, DENSE)[1].sample

    state = tx.init(DENSE)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    _, alone = update(tx, DENSE, state, DENSE)
    assert_close(jax.jit(mapped)(state, jnp.ones(2)), alone.sample)


def test_vmapped_states_have_their_own_samples():
    tx = mc.metrics(optax.sgd(1.0), every=2)
    state: Any = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(DENSE))
    state = state._replace(count=jnp.asarray([1, 2], jnp.int32))
    _, state = jax.vmap(lambda s: tx.update(DENSE, s))(state)
    assert state.sample["step"].tolist() == [-1, 2]


# -- what is refused --

NUMBER: Any = 0.02
STATE = watched().init(ATTENTION)
KEYS = mc.MatrixRules([("key/kernel$", None)])
CLIPPED, OTHER = watched(qk_clip_threshold=1.0), {"other": jnp.ones(4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: watched(every=2.5), r"every must be an integer from 1, got 2\.5"),
        (lambda: watched(qk_clip_threshold=-1.0), "qk_clip_threshold must be positive, got -1"),
        (lambda: mc.metrics(NUMBER), "metrics|takes a gradient transformation"),
        (lambda: measured(CLIPPED, ATTENTION, OTHER), "recorded for 'other'"),
        (lambda: measured(CLIPPED, ATTENTION, None), "update got no maxima"),
        (lambda: mc.read_metrics((), ATTENTION), "has 0 states of metrics"),
        (lambda: mc.read_metrics((STATE, STATE), ATTENTION), "has 2 states of metrics"),
        (lambda: mc.read_metrics(STATE, ATTENTION, rules=KEYS), "of 2 matrices .* params have 1"),
    ],
)
def test_what_is_refused(call: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
