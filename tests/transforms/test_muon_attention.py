"""Attention kernels by component and by head, against slices orthogonalised by hand in NumPy.

Every case lists the cuts that make a kernel's matrices. Each piece is orthogonalised by a float64
SVD and scaled by its own shape; nothing of the library is used.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

D, H, K, S = 12, 4, 2, 3  # width, query heads, key heads, size of a head
NOPE, ROPE, V, RANK, LATENT = 3, 2, 4, 7, 5


class Leaf(NamedTuple):
    """A kernel's shape, the view that is cut, the pieces along each axis, and its input axes."""

    shape: tuple[int, ...]
    cuts: dict[int, tuple[int, ...]] = {}  # noqa: RUF012
    view: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)


def each(count: int) -> tuple[int, ...]:
    return (1,) * count


def flat(inputs: int, heads: int, size: int, cut: bool = True) -> Leaf:
    """A kernel `(inputs, heads * size)`, by head or whole."""
    return Leaf((inputs, heads * size), {1: each(heads)} if cut else {}, (inputs, heads, size))


OUT, OUT_APART = Leaf((H * S, D)), Leaf((H, S, D), inputs=(0, 1))
JOINED = Leaf((D, LATENT + ROPE), {1: (LATENT, ROPE)})
FUSED = (D, (H + 2 * K) * S)


def models(by_head: bool) -> dict[str, dict[str, Leaf]]:
    """Linen's attention, Gemma's, latent attention of MaxText and DeepSeek, a query with a gate."""

    def heads(count: int) -> tuple[int, ...]:
        return each(count) if by_head else (count,)

    def apart(count: int) -> Leaf:
        return Leaf((D, count, S), {1: heads(count)})

    def parts(inputs: int, *sizes: int, merged: bool = False) -> Leaf:
        """A kernel whose heads have parts one after the other."""
        view = (inputs, H, sum(sizes))
        shape = (inputs, H * sum(sizes)) if merged else view
        return Leaf(shape, {2: sizes, 1: heads(H)}, view)

    return {
        "linen": {
            "query/bias": Leaf((H, S)),
            "query/kernel": apart(H),
            "key/kernel": apart(K),
            "value/kernel": apart(K),
            "out/kernel": OUT_APART,
        },
        "gemma": {
            "q_einsum/w": Leaf((H, D, S), {0: heads(H)}, inputs=(1,)),
            "kv_einsum/w": Leaf((2, K, D, S), {0: each(2), 1: heads(K)}, inputs=(2,)),
            "attn_vec_einsum/w": OUT_APART,
        },
        "maxtext": {
            "wq_a/kernel": Leaf((D, RANK)),
            "wq_b/kernel": parts(RANK, NOPE, ROPE),
            "wkv_a/kernel": JOINED,
            "wkv_b/kernel": parts(LATENT, NOPE, V),
            "out/kernel": Leaf((H, V, D), inputs=(0, 1)),
        },
        "deepseek": {
            "q_proj/kernel": parts(D, NOPE, ROPE, merged=True),
            "kv_a_proj_with_mqa/kernel": JOINED,
            "kv_b_proj/kernel": parts(LATENT, NOPE, V, merged=True),
            "o_proj/kernel": Leaf((H * V, D)),
        },
        "gate": {
            "q_proj/kernel": parts(D, S, S),
            "k_proj/kernel": apart(K),
            "o_proj/kernel": OUT_APART,
        },
    }


def own(*queries: str, **how: Any) -> mc.AttentionLayout:
    names = mc.Projection("ask", queries, **how), mc.Projection("answer", ("key",))
    return mc.AttentionLayout(names, head_dim=S)


#: Rules, and blocks that have these rules: one tree, and one program.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Leaf]]]] = {
    "merged": ({}, {"linen": models(by_head=False)["linen"]}),
    "split": (
        {"attention": "split"},
        {
            **models(by_head=False),
            "gpt2": {"c_attn/kernel": Leaf((D, 3 * D), {1: (D, D, D)}), "c_proj/kernel": OUT},
            "phi": {
                "qkv_proj/kernel": Leaf(FUSED, {1: (H * S, K * S, K * S)}),
                "o_proj/kernel": OUT,
            },
        },
    ),
    "heads": ({"attention": "per_head"}, models(by_head=True)),
    "heads of a size": (
        {"attention": "per_head", "head_dim": S},
        {
            "llama": {
                "q_proj/kernel": flat(D, H, S),
                "k_proj/kernel": flat(D, K, S),
                "v_proj/kernel": flat(D, K, S),
                "o_proj/kernel": OUT,
            },
            "gpt2": {"c_attn/kernel": flat(D, 3 * H, S), "c_proj/kernel": OUT},
            "phi": {"qkv_proj/kernel": flat(D, H + 2 * K, S), "o_proj/kernel": OUT},
            "falcon": {"query_key_value/kernel": flat(D, H + 2 * K, S), "dense/kernel": OUT},
        },
    ),
    "groups": (
        {"attention": "split", "head_dim": S},
        {
            "falcon": {
                "query_key_value/kernel": Leaf(FUSED, {2: (H // K, 1, 1)}, (D, K, H // K + 2, S)),
                "dense/kernel": OUT,
            }
        },
    ),
    "own names": (
        {"attention": "per_head", "blocks": own("query")},
        {"mine": {"ask/w": flat(D, H, S), "answer/w": flat(D, K, S), "out/w": OUT}},
    ),
    "own names, gate by group": (
        {"attention": "split", "blocks": ("attn$", own("query", "gate", interleaved="group"))},
        {
            "mine": {
                "ask/w": Leaf((D, 2 * H * S), {2: each(2)}, (D, K, 2, H // K, S)),
                "answer/w": flat(D, K, S, cut=False),
            }
        },
    ),
}


def by_hand(x: np.ndarray, leaf: Leaf, rms: float = 0.2) -> np.ndarray:
    """One layer, piece by piece."""
    view = x.reshape(leaf.view or leaf.shape)
    out = np.zeros(view.shape)
    bounds = [
        list(itertools.pairwise(np.cumsum((0, *leaf.cuts.get(axis, (size,))))))
        for axis, size in enumerate(view.shape)
    ]
    for piece in itertools.product(*bounds):
        index = tuple(slice(*ends) for ends in piece)
        front = np.moveaxis(view[index], leaf.inputs, range(len(leaf.inputs)))
        rows = int(np.prod(front.shape[: len(leaf.inputs)]))
        u, _, vh = np.linalg.svd(front.reshape(rows, -1).astype(np.float64), full_matrices=False)
        matrix = rms * np.sqrt(max(rows, front.size // rows)) * (u @ vh)
        out[index] = np.moveaxis(matrix.reshape(front.shape), range(len(leaf.inputs)), leaf.inputs)
    return out.reshape(x.shape)


def nested(block: dict[str, Any]) -> Any:
    modules = {name.split("/")[0] for name in block}
    return {
        m: {n.split("/")[1]: x for n, x in block.items() if n.split("/")[0] == m} for m in modules
    }


STACKED = [("split", 0), ("heads", 1)]


@pytest.mark.parametrize(("family", "scan_axis"), [*((name, None) for name in FAMILIES), *STACKED])
def test_every_piece_is_a_matrix_of_its_own(family: str, scan_axis: int | None):
    settings, blocks = FAMILIES[family]
    rules = mc.MatrixRules(scan_axis=scan_axis or 0, **settings)
    container, layers = ("layers_0", 1) if scan_axis is None else ("layers", 2)
    rng = np.random.default_rng(0)
    values = {
        model: {name: rng.standard_normal((layers, *leaf.shape)) for name, leaf in block.items()}
        for model, block in blocks.items()
    }

    def tree(values: Any) -> Any:
        def stacked(x: np.ndarray) -> jax.Array:
            axis = scan_axis if scan_axis is not None and x.ndim > 2 else 0
            x = x[0] if scan_axis is None else np.moveaxis(x, 0, axis)
            return jnp.asarray(x, jnp.float32)

        return {
            model: {container: {"attn": nested({n: stacked(x) for n, x in block.items()})}}
            for model, block in values.items()
        }

    muon = optax.chain(
        mc.scale_by_muon(ns_method="svd", rules=rules),
        mc.scale_by_shape(consistent_rms=0.2, rules=rules),
    )
    tx = optax.multi_transform({"muon": muon, "adamw": optax.identity()}, rules.labels)
    grads = tree(values)
    updates: Any = jax.jit(tx.update)(grads, tx.init(grads), grads)[0]
    for model, block in values.items():
        for name, x in block.items():
            if "bias" not in name:
                block[name] = np.stack([by_hand(y, blocks[model][name]) for y in x])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), updates, tree(values))


@pytest.mark.parametrize("attention", ["split", "per_head"])
def test_muonclip_takes_the_rules_and_clips_beside_them(attention):
    block = {n: jnp.ones(leaf.shape) for n, leaf in models(by_head=True)["maxtext"].items()}
    params = {"layers_0": {"attn": nested(block)}}
    rules = mc.MatrixRules(attention=attention)
    tx: Any = mc.muonclip(0.02, rules=rules)
    maxima = {"layers_0/attn": jnp.asarray([400.0, 1.0, 1.0, 1.0])}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, max_logits=maxima)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    config = mc.MuonClipConfig(learning_rate=0.02, rules=rules)
    assert hash(config) == hash(mc.MuonClipConfig(learning_rate=0.02, rules=rules))
