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
from muonclip_jax.transforms._figures import effective_rank, update_figures
from tests.helpers import TOLERANCE, update

RNG = np.random.default_rng(0)
GAUSSIAN = RNG.standard_normal((24, 40))
LOW_RANK = RNG.standard_normal((24, 3)) @ RNG.standard_normal((3, 40)) + 1e-2 * GAUSSIAN

#: Wide matrices: ordinary ones and each degenerate case.
MATRICES = {
    "gaussian": GAUSSIAN,
    "low rank": LOW_RANK,
    "ill conditioned": GAUSSIAN * np.logspace(0, -6, 24)[:, None],
    "orthogonal": 3 * np.linalg.qr(GAUSSIAN.T)[0].T,
    "rank one": np.outer(GAUSSIAN[:, 0], GAUSSIAN[0]),
    "one row": GAUSSIAN[:1],
    "one entry": GAUSSIAN[:1, :1],
    "tiny": 1e-30 * GAUSSIAN,
    "huge": 1e30 * GAUSSIAN,
    "complex": GAUSSIAN + 1j * LOW_RANK,
}
#: The power iteration's own error, on the spectra above; everything else is rounding.
POWER = 5e-3


def of_singular_values(x: np.ndarray) -> dict[str, float]:
    """The definitions, in float64."""
    s = np.linalg.svd(x, compute_uv=False)
    square = s**2 / np.mean(s**2)
    return {
        "update_rms": float(np.sqrt(np.mean(np.abs(x) ** 2))),
        "spectral_norm": float(s[0]),
        "orthogonality_error": float(np.sqrt(np.mean((square - 1) ** 2))),
        "effective_rank": float(np.sum(s**2) ** 2 / np.sum(s**4)),
    }


@pytest.mark.parametrize("x", MATRICES.values(), ids=MATRICES)
def test_figures_are_those_of_the_singular_values(x: np.ndarray):
    expected = of_singular_values(x)
    stack = jnp.asarray(x[None])
    rms, norm, error = (float(figure[0]) for figure in update_figures(stack))
    np.testing.assert_allclose(rms, expected["update_rms"], rtol=TOLERANCE["float32"])
    np.testing.assert_allclose(norm, expected["spectral_norm"], rtol=POWER)
    assert norm <= expected["spectral_norm"] * (1 + TOLERANCE["float32"])
    np.testing.assert_allclose(
        error, expected["orthogonality_error"], rtol=TOLERANCE["float32"], atol=1e-6
    )
    rank = float(effective_rank(stack)[0, 0])
    np.testing.assert_allclose(rank, expected["effective_rank"], rtol=TOLERANCE["float32"])
    stable_rank = np.sum(np.abs(x) ** 2) / expected["spectral_norm"] ** 2
    assert stable_rank * (1 - 1e-5) <= rank <= min(x.shape) * (1 + 1e-5)


def test_figures_of_the_zero_matrix():
    figures = update_figures(jnp.zeros((1, 3, 5)))
    assert [float(figure[0]) for figure in figures] == [0.0, 0.0, 1.0]
    assert float(effective_rank(jnp.zeros((1, 3, 5)))[0, 0]) == 0.0


def test_an_orthogonal_matrix_in_bfloat16_is_as_far_off_as_its_rounding():
    x = jnp.asarray(MATRICES["orthogonal"], jnp.bfloat16)
    expected = of_singular_values(np.asarray(x, np.float64))["orthogonality_error"]
    np.testing.assert_allclose(update_figures(x[None])[2], expected, rtol=1e-3)
    assert 1e-4 < expected < TOLERANCE["bfloat16"]


# -- in a tree --

PARAMS = {
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
    ]
)


def tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def matrices(values: Any) -> dict[str, list[np.ndarray]]:
    """Every matrix that Muon trains, cut by hand."""
    x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), values)
    return {
        "attention/key/kernel": [x["attention"]["key"]["kernel"].reshape(8, 8)],
        "attention/query/kernel": [x["attention"]["query"]["kernel"].reshape(8, 8)],
        "fused/kernel": [x["fused"]["kernel"][:, :4], x["fused"]["kernel"][:, 4:]],
        "tall/kernel": [x["tall"]["kernel"]],
        "wi_0/kernel": list(x["wi_0"]["kernel"]),
    }


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Any, Any]:
    """Gradients, state and metrics of a step of momentum SGD that keeps `mu` as Adam does."""
    gradients = tree(1)
    tx = mc.metrics(optax.chain(optax.scale_by_adam(b1=0.9), optax.scale(-0.5)), rules=RULES)
    updates, state = jax.jit(tx.update)(gradients, tx.init(tree(0)), tree(0))
    return updates, state, mc.read_metrics(state, tree(0), rules=RULES)


@pytest.mark.parametrize(
    "name", ["update_rms", "spectral_norm", "orthogonality_error", "effective_rank"]
)
def test_every_matrix_has_its_own_figure_under_its_leafs_path(measured: Any, name: str):
    updates, state, figures = measured
    of = state.inner_state[0].mu if name == "effective_rank" else updates
    expected = matrices(of)
    actual = getattr(figures, name)
    assert list(actual) == list(expected)
    for path, parts in expected.items():
        wanted = [of_singular_values(part)[name] for part in parts]
        np.testing.assert_allclose(actual[path], wanted, rtol=POWER)


def test_scalars_reduce_the_matrices_of_a_leaf_and_of_the_model(measured: Any):
    updates, _, figures = measured
    flat = {name: float(value) for name, value in figures.scalars("m").items()}
    everything = [of_singular_values(x) for parts in matrices(updates).values() for x in parts]
    stacked = [of_singular_values(x) for x in matrices(updates)["wi_0/kernel"]]
    np.testing.assert_allclose(
        flat["m/update_rms/wi_0/kernel"],
        np.sqrt(np.mean([x["update_rms"] ** 2 for x in stacked])),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        flat["m/orthogonality_error"], max(x["orthogonality_error"] for x in everything), rtol=1e-5
    )
    assert set(figures.scalars("m", leaves=False)) == {
        f"m/{name}"
        for name in (
            "update_rms",
            "spectral_norm",
            "orthogonality_error",
            "effective_rank",
        )
    }


def test_a_state_without_momentum_has_rank_zero():
    tx = mc.metrics(optax.sgd(0.1), rules=RULES)
    _, state = update(tx, tree(1), tx.init(tree(0)))
    assert not mc.read_metrics(state, tree(0), rules=RULES).effective_rank["tall/kernel"].any()


def test_muons_update_is_orthogonal_and_its_momentum_is_not():
    params = {"dense": {"kernel": jnp.asarray(LOW_RANK, jnp.float32)}}
    tx = mc.metrics(
        mc.muonclip(0.02, qk_clip_threshold=None, ns_method="svd", weight_decay=0.0), every=1
    )
    _, state = update(tx, params, tx.init(params), params)
    figures = mc.read_metrics(state, params)
    assert float(figures.orthogonality_error["dense/kernel"][0]) < 1e-5
    assert float(figures.effective_rank["dense/kernel"][0]) < 4
    np.testing.assert_allclose(
        figures.update_rms["dense/kernel"][0], 0.02 * 0.2, rtol=TOLERANCE["float32"]
    )


# -- when --


def test_a_sample_every_third_update_and_nothing_changes_between():
    params = {"dense": {"kernel": jnp.asarray(GAUSSIAN, jnp.float32)}}
    inner = mc.muonclip(0.02, qk_clip_threshold=None)
    tx = mc.metrics(inner, every=3)

    def step(tx: Any, state: Any, scale: Any) -> Any:
        grads = jax.tree.map(lambda p: p * jnp.cos(scale * jnp.arange(p.shape[-1])), params)
        updates, state = tx.update(grads, state, params)
        return state, (updates, getattr(state, "sample", None))

    scales = jnp.arange(7.0)
    state, (updates, samples) = jax.jit(
        lambda s: jax.lax.scan(lambda s, x: step(tx, s, x), s, scales)
    )(tx.init(params))
    alone, (plain, _) = jax.jit(lambda s: jax.lax.scan(lambda s, x: step(inner, s, x), s, scales))(
        inner.init(params)
    )
    assert samples["step"].tolist() == [0, 0, 0, 3, 3, 3, 6]
    for values in samples.values():
        for held, start in ((1, 0), (2, 0), (4, 3), (5, 3)):
            np.testing.assert_array_equal(values[held], values[start])
    assert samples["spectral_norm"][0] != samples["spectral_norm"][3] != samples["spectral_norm"][6]
    for actual, expected in ((updates, plain), (state.inner_state, alone)):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-6), actual, expected
        )


def test_between_samples_nothing_is_computed():
    params = tree(0)
    tx = mc.metrics(optax.sgd(0.1), rules=RULES, qk_clip_threshold=100.0)
    maxima = {"attention": jnp.ones(2)}
    program = jax.make_jaxpr(lambda g, s: tx.update(g, s, max_logits=maxima))(
        params, tx.init(params)
    )
    outside = [equation for equation in program.eqns if equation.primitive.name != "cond"]
    (branches,) = [e.params["branches"] for e in program.eqns if e.primitive.name == "cond"]
    # Outside are the maxima's reductions for the clip's effect; no matrix is looked at.
    assert not any(word in str(outside) for word in ("dot_general", "while"))
    kept, taken = (str(branch) for branch in branches)
    assert "dot_general" in taken
    assert "let  in" in " ".join(kept.split()) or not branches[0].jaxpr.eqns


# -- QK-Clip --

ATTENTION = {"attn": {name: {"kernel": jnp.ones((6, 4, 2))} for name in ("query", "key")}}
STACKED = {"attn": {name: {"kernel": jnp.ones((3, 6, 4, 2))} for name in ("query", "key")}}


@pytest.mark.parametrize("stacked", [False, True])
def test_maxima_and_gammas_are_those_of_qk_clip(stacked: bool):
    params = STACKED if stacked else ATTENTION
    shape = (2, 3, 4) if stacked else (4,)
    max_logits = {"attn": {"max_logits": (jnp.asarray(RNG.uniform(50, 250, shape)),)}}
    rules = mc.MatrixRules(scan_axis=0)  # two kernels of one shape do not show it
    tx = mc.metrics(mc.muonclip(0.02, rules=rules), rules=rules, qk_clip_threshold=100.0)
    _, state = jax.jit(tx.update)(params, tx.init(params), params, max_logits=max_logits)
    figures = mc.read_metrics(state, params, rules=rules)
    info = mc.qk_clip_info(params, max_logits, threshold=100.0)
    assert float(figures.max_logit["attn"]) == float(info.largest) > 100
    assert float(figures.min_gamma["attn"]) == float(info.gamma["attn"].min()) < 1
    assert int(figures.clipped_heads["attn"]) == int(info.total_clipped) > 0


def test_a_threshold_may_be_a_schedule():
    tx = mc.metrics(optax.sgd(0.1), every=1, qk_clip_threshold=mc.clip_until(1, 100.0))
    state = tx.init(ATTENTION)
    clipped = []
    for _ in range(2):
        _, state = update(tx, ATTENTION, state, max_logits={"attn": jnp.full(4, 200.0)})
        clipped.append(int(mc.read_metrics(state, ATTENTION).clipped_heads["attn"]))
    assert clipped == [4, 0]


def test_without_a_threshold_there_is_nothing_of_attention():
    tx = mc.metrics(optax.sgd(0.1))
    _, state = update(tx, ATTENTION, tx.init(ATTENTION), max_logits={"attn": jnp.full(4, 200.0)})
    figures = mc.read_metrics(state, ATTENTION)
    assert figures.max_logit == figures.min_gamma == figures.clipped_heads == {}
    assert not any("max_logit" in name for name in figures.scalars())


def test_an_infinite_threshold_shows_the_maxima_of_a_model_that_cannot_be_clipped():
    # Gains that heads share: no kernel's scale reaches the logits.
    gains = {f"{name}_norm": {"scale": jnp.ones(2)} for name in ("query", "key")}
    params = {"attn": {**ATTENTION["attn"], **gains}}
    maxima = {"attn": jnp.full(4, 200.0)}
    tx = mc.metrics(optax.sgd(0.1), qk_clip_threshold=jnp.inf)
    _, state = update(tx, params, tx.init(params), max_logits=maxima)
    figures = mc.read_metrics(state, params)
    assert float(figures.max_logit["attn"]) == 200.0
    assert float(figures.min_gamma["attn"]) == 1.0
    clipping = mc.metrics(optax.sgd(0.1), qk_clip_threshold=100.0)
    with pytest.raises(ValueError, match="attn"):
        clipping.update(params, clipping.init(params), max_logits=maxima)


def no_effect_steps(maxima: Any, threshold: float = 100.0) -> list[int]:
    """Returns the count after each update whose largest logits are given."""
    tx = mc.metrics(optax.identity(), every=1000, qk_clip_threshold=threshold)

    def step(state: Any, x: Any) -> Any:
        _, state = tx.update(ATTENTION, state, max_logits={"attn": x})
        return state, mc.read_metrics(state, ATTENTION).clips_without_effect["attn"]

    rows = jnp.asarray(maxima, jnp.float32)[:, None] * jnp.asarray([0.1, 1.0, 0.5, -1.0])
    return jax.lax.scan(step, tx.init(ATTENTION), rows)[1].tolist()


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
    assert no_effect_steps(maxima) == expected
    assert no_effect_steps(maxima, np.inf) == [0] * len(maxima)


@pytest.mark.parametrize("normalised", [True, False])
def test_normalised_queries_and_keys_without_gains_are_reported(normalised: bool):
    """No leaf of the tree shows the normalisation; a run does."""
    params: Any = jax.tree.map(lambda x: x * RNG.standard_normal(x.shape), ATTENTION)
    x = jnp.asarray(RNG.standard_normal((5, 6)), jnp.float32)
    tx = mc.metrics(mc.qk_clip(1.0), every=1000, qk_clip_threshold=1.0)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        q, k = (jnp.einsum("td,dhk->thk", x, params["attn"][n]["kernel"]) for n in ("query", "key"))
        if normalised:
            q, k = (2 * y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
        maxima = {"attn": jnp.einsum("thk,shk->hts", q, k).max((1, 2))}
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params, max_logits=maxima)
        figures = mc.read_metrics(state, params)
        return (optax.apply_updates(params, updates), state), figures.scalars(leaves=False)

    carry: Any = (params, tx.init(params))
    (_, state), scalars = jax.lax.scan(step, carry, length=9)
    assert int(state.sample["clips_without_effect"][0]) == (8 if normalised else 0)
    assert scalars["muon/clips_without_effect"].tolist()[-1] == (8 if normalised else 0)


def test_blocks_that_are_not_selected_have_no_figures():
    params = {"encoder": ATTENTION, "decoder": ATTENTION}
    tx = mc.metrics(optax.sgd(0.1), qk_clip_threshold=100.0, qk_clip_blocks="decoder")
    maxima = {"decoder/attn": jnp.full(4, 200.0)}
    _, state = update(tx, params, tx.init(params), max_logits=maxima)
    figures = mc.read_metrics(state, params, qk_clip_blocks="decoder")
    assert list(figures.max_logit) == ["decoder/attn"]
    with pytest.raises(ValueError, match=r"and 1 attention blocks, and params have 4 and 2"):
        mc.read_metrics(state, params)


# -- wherever it stands --


def test_inside_of_multi_transform_and_accumulate():
    params = {**ATTENTION, "norm": {"scale": jnp.ones(6)}}
    measured = mc.metrics(mc.scale_by_muon(), every=1, qk_clip_threshold=100.0)
    muon = optax.chain(measured, optax.scale(-0.02))
    routed = optax.multi_transform({"muon": muon, "adamw": optax.adamw(1e-3)}, mc.label_params)
    tx = mc.accumulate(routed, 2, max_logits={"attn": jnp.ones(4)})
    state: Any = tx.init(params)
    step = jax.jit(tx.update)
    for scale in (100.0, 300.0, 50.0):
        _, state = step(params, state, params, max_logits={"attn": jnp.full(4, scale)})
    figures = mc.read_metrics(state, params)
    # One step was taken, with the maxima of both micro-batches; the third waits for the fourth.
    assert int(figures.step) == 0
    assert float(figures.max_logit["attn"]) == 300.0
    assert list(figures.update_rms) == ["attn/key/kernel", "attn/query/kernel"]


def test_in_the_optimizer_of_nnx():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = mc.metrics(mc.muonclip(0.02, qk_clip_threshold=None))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    figures = mc.read_metrics(optimizer.opt_state, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(figures.effective_rank["kernel"], [1.0], rtol=TOLERANCE["float32"])


def test_inside_of_shard_map():
    params = {"dense": {"kernel": jnp.asarray(GAUSSIAN, jnp.float32)}}
    tx = mc.metrics(mc.scale_by_muon(), every=1)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(state: Any, batch: jax.Array) -> Any:
        gradients = jax.tree.map(lambda p: jax.lax.pmean(p * batch.sum(), "batch"), params)
        return update(tx, gradients, state, params)[1].sample

    state = tx.init(params)
    sample = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P()))(
        state, jnp.ones(2)
    )
    _, alone = update(tx, params, state, params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5), sample, alone.sample
    )


def test_vmapped_states_have_their_own_samples():
    params = {"dense": {"kernel": jnp.asarray(GAUSSIAN, jnp.float32)}}
    tx = mc.metrics(optax.sgd(1.0), every=2)
    state: Any = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(params))
    state = state._replace(count=jnp.asarray([1, 2], jnp.int32))
    _, state = jax.vmap(lambda s: tx.update(params, s))(state)
    assert state.sample["step"].tolist() == [-1, 2]


# -- what is refused --


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"every must be an integer from 1, got 2\.5"):
        mc.metrics(optax.sgd(0.1), every=2.5)
    with pytest.raises(ValueError, match="qk_clip_threshold must be positive, got -1"):
        mc.metrics(optax.sgd(0.1), qk_clip_threshold=-1.0)
    wrong: Any = 0.02
    with pytest.raises(TypeError, match=r"metrics|takes a gradient transformation"):
        mc.metrics(wrong)


def test_maxima_of_a_block_that_is_not_there():
    tx = mc.metrics(optax.sgd(0.1), qk_clip_threshold=100.0)
    with pytest.raises(ValueError, match="recorded for 'other'"):
        tx.update(ATTENTION, tx.init(ATTENTION), max_logits={"other": jnp.ones(4)})
    with pytest.raises(ValueError, match="update got no maxima"):
        tx.update(ATTENTION, tx.init(ATTENTION))


def test_reading_says_what_does_not_fit():
    tx = mc.metrics(optax.sgd(0.1))
    state = tx.init(ATTENTION)
    with pytest.raises(ValueError, match="has 0 states of metrics"):
        mc.read_metrics(optax.sgd(0.1).init(ATTENTION), ATTENTION)
    with pytest.raises(ValueError, match="has 2 states of metrics"):
        mc.read_metrics((state, state), ATTENTION)
    rules = mc.MatrixRules([("key/kernel$", None)])
    with pytest.raises(ValueError, match=r"metrics of 2 matrices .* params have 1"):
        mc.read_metrics(state, ATTENTION, rules=rules)
