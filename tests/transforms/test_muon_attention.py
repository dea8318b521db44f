"""Attention kernels by component and by head, against slices orthogonalised by hand in NumPy.

Every case lists, in NumPy's own indexing, the pieces that must become matrices. Each piece is
orthogonalised by a float64 SVD and scaled by its own shape; nothing of the library is used.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

Pieces = Callable[[np.ndarray], Iterator[np.ndarray]]
D, H, K, S = 12, 4, 2, 3  # width, query heads, key heads, size of a head
NOPE, ROPE, V, RANK, LATENT = 3, 2, 4, 7, 5


class Case(NamedTuple):
    """Shapes of an attention block; for the leaves that are cut, views with inputs on axis 0."""

    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, Pieces]
    rules: dict[str, Any]


def heads_of(x: np.ndarray) -> Iterator[np.ndarray]:
    """The heads of `(inputs, heads, size)`."""
    yield from (x[:, h] for h in range(x.shape[1]))


def heads_first(x: np.ndarray) -> Iterator[np.ndarray]:
    """The heads of `(heads, inputs, size)`."""
    yield from x


def merged(size: int) -> Pieces:
    """The heads of `(inputs, heads * size)`."""
    return lambda x: (x[:, start : start + size] for start in range(0, x.shape[1], size))


def thirds(x: np.ndarray) -> Iterator[np.ndarray]:
    n = x.shape[1] // 3
    yield from (x[:, :n], x[:, n : 2 * n], x[:, 2 * n :])


def grouped(x: np.ndarray) -> Iterator[np.ndarray]:
    """Queries, keys, values one after the other, with fewer key heads."""
    yield from (x[:, : H * S], x[:, H * S : (H + K) * S], x[:, (H + K) * S :])


def by_group(x: np.ndarray) -> Iterator[np.ndarray]:
    """A group's queries, its key, its value, then the next group."""
    rows = x.reshape(D, K, H // K + 2, S)
    yield from (rows[:, :, : H // K], rows[:, :, H // K], rows[:, :, H // K + 1])


def by_head_and_part(sizes: tuple[int, ...], heads: int) -> tuple[Pieces, Pieces]:
    """Pieces of `(inputs, heads * sum(sizes))` or `(inputs, heads, sum(sizes))`."""
    bounds = np.cumsum((0, *sizes))

    def split(x):
        rows = x.reshape(len(x), heads, sum(sizes))
        yield from (rows[:, :, a:b] for a, b in itertools.pairwise(bounds))

    def single(x):
        for part in split(x):
            yield from heads_of(part)

    return split, single


def joined(x: np.ndarray) -> Iterator[np.ndarray]:
    """The latent and the shared rotary key."""
    yield from (x[:, :LATENT], x[:, LATENT:])


LINEN = {
    "query/kernel": (D, H, S),
    "query/bias": (H, S),
    "key/kernel": (D, K, S),
    "value/kernel": (D, K, S),
    "out/kernel": (H, S, D),
}
LLAMA = {
    "q_proj/kernel": (D, H * S),
    "k_proj/kernel": (D, K * S),
    "v_proj/kernel": (D, K * S),
    "o_proj/kernel": (H * S, D),
}
GEMMA = {
    "q_einsum/w": (H, D, S),
    "kv_einsum/w": (2, K, D, S),
    "attn_vec_einsum/w": (H, S, D),
}
GPT2 = {"c_attn/kernel": (D, 3 * D), "c_proj/kernel": (D, D)}
PHI = {"qkv_proj/kernel": (D, (H + 2 * K) * S), "o_proj/kernel": (H * S, D)}
FALCON = {"query_key_value/kernel": (D, (H + 2 * K) * S), "dense/kernel": (H * S, D)}
MAXTEXT_MLA = {
    "wq_a/kernel": (D, RANK),
    "wq_b/kernel": (RANK, H, NOPE + ROPE),
    "wkv_a/kernel": (D, LATENT + ROPE),
    "wkv_b/kernel": (LATENT, H, NOPE + V),
    "out/kernel": (H, V, D),
}
DEEPSEEK = {
    "q_proj/kernel": (D, H * (NOPE + ROPE)),
    "kv_a_proj_with_mqa/kernel": (D, LATENT + ROPE),
    "kv_b_proj/kernel": (LATENT, H * (NOPE + V)),
    "o_proj/kernel": (H * V, D),
}
QWEN3_NEXT = {
    "q_proj/kernel": (D, H, 2 * S),
    "k_proj/kernel": (D, K, S),
    "v_proj/kernel": (D, K, S),
    "o_proj/kernel": (H, S, D),
}

_Q_SPLIT, _Q_HEADS = by_head_and_part((NOPE, ROPE), H)
_KV_SPLIT, _KV_HEADS = by_head_and_part((NOPE, V), H)
_GATE_SPLIT, _GATE_HEADS = by_head_and_part((S, S), H)
MLA_SPLIT = {"wq_b/kernel": _Q_SPLIT, "wkv_b/kernel": _KV_SPLIT, "wkv_a/kernel": joined}
MLA_HEADS = {"wq_b/kernel": _Q_HEADS, "wkv_b/kernel": _KV_HEADS, "wkv_a/kernel": joined}
PER_HEAD = {"attention": "per_head"}
SIZED = {"attention": "per_head", "head_dim": S}


def _falcon_heads(x):
    yield from merged(S)(x)


CASES = {
    "linen, merged": Case(LINEN, {}, {}),
    "linen, split": Case(LINEN, {}, {"attention": "split"}),
    "linen, heads": Case(
        LINEN, dict.fromkeys(("query/kernel", "key/kernel", "value/kernel"), heads_of), PER_HEAD
    ),
    "llama, heads": Case(
        LLAMA,
        dict.fromkeys(("q_proj/kernel", "k_proj/kernel", "v_proj/kernel"), merged(S)),
        SIZED,
    ),
    "gemma, split": Case(
        GEMMA,
        {
            "q_einsum/w": lambda x: iter([np.moveaxis(x, 1, 0)]),
            "kv_einsum/w": lambda x: (np.moveaxis(part, 1, 0) for part in x),
        },
        {"attention": "split"},
    ),
    "gemma, heads": Case(
        GEMMA,
        {"q_einsum/w": heads_first, "kv_einsum/w": lambda x: (h for part in x for h in part)},
        PER_HEAD,
    ),
    "gpt2, split": Case(GPT2, {"c_attn/kernel": thirds}, {"attention": "split"}),
    "gpt2, heads": Case(GPT2, {"c_attn/kernel": merged(S)}, SIZED),
    "phi, split": Case(PHI, {"qkv_proj/kernel": grouped}, {"attention": "split"}),
    "phi, heads": Case(PHI, {"qkv_proj/kernel": merged(S)}, SIZED),
    "falcon, split": Case(
        FALCON, {"query_key_value/kernel": by_group}, {"attention": "split", "head_dim": S}
    ),
    "falcon, heads": Case(FALCON, {"query_key_value/kernel": merged(S)}, SIZED),
    "maxtext latent, split": Case(MAXTEXT_MLA, MLA_SPLIT, {"attention": "split"}),
    "maxtext latent, heads": Case(MAXTEXT_MLA, MLA_HEADS, PER_HEAD),
    "deepseek, split": Case(
        DEEPSEEK,
        {
            "q_proj/kernel": _Q_SPLIT,
            "kv_b_proj/kernel": _KV_SPLIT,
            "kv_a_proj_with_mqa/kernel": joined,
        },
        {"attention": "split"},
    ),
    "deepseek, heads": Case(
        DEEPSEEK,
        {
            "q_proj/kernel": _Q_HEADS,
            "kv_b_proj/kernel": _KV_HEADS,
            "kv_a_proj_with_mqa/kernel": joined,
        },
        PER_HEAD,
    ),
    "gate, split": Case(QWEN3_NEXT, {"q_proj/kernel": _GATE_SPLIT}, {"attention": "split"}),
    "gate, heads": Case(
        QWEN3_NEXT,
        {
            "q_proj/kernel": _GATE_HEADS,
            "k_proj/kernel": heads_of,
            "v_proj/kernel": heads_of,
        },
        PER_HEAD,
    ),
    "own names, heads": Case(
        {"ask/w": (D, H * S), "answer/w": (D, K * S), "out/w": (H * S, D)},
        {"ask/w": merged(S), "answer/w": merged(S)},
        {
            "attention": "per_head",
            "blocks": mc.AttentionLayout(
                (mc.Projection("ask", ("query",)), mc.Projection("answer", ("key",))), head_dim=S
            ),
        },
    ),
    "own names, gate by group": Case(
        {"ask/w": (D, 2 * H * S), "answer/w": (D, K * S)},
        {
            "ask/w": lambda x: iter([x.reshape(D, K, 2, H // K, S)[:, :, i] for i in range(2)]),
        },
        {
            "attention": "split",
            "blocks": (
                "attn$",
                mc.AttentionLayout(
                    (
                        mc.Projection("ask", ("query", "gate"), interleaved="group"),
                        mc.Projection("answer", ("key",)),
                    ),
                    head_dim=S,
                ),
            ),
        },
    ),
}


def tree_of(
    shapes: dict[str, tuple[int, ...]],
    container: str,
    stack: tuple[int, ...] = (),
    scan_axis: int = 0,
) -> Any:
    """Random gradients, nested as a model has them, stacked on `scan_axis`."""
    rng = np.random.default_rng(0)
    block: dict[str, Any] = {}
    for name, shape in shapes.items():
        *modules, leaf = name.split("/")
        inner = block
        for module in modules:
            inner = inner.setdefault(module, {})
        at = scan_axis if len(shape) > 1 else 0
        inner[leaf] = rng.standard_normal(shape[:at] + stack + shape[at:]).astype(np.float32)
    return {container: {"attn": block}}


def polar(x: np.ndarray) -> np.ndarray:
    u, _, vh = np.linalg.svd(x.reshape(len(x), -1).astype(np.float64), full_matrices=False)
    return (u @ vh).reshape(x.shape)


def by_hand(x: np.ndarray, pieces: Pieces | None, outputs: int, rms: float) -> np.ndarray:
    """One layer, piece by piece; `outputs` is the number of trailing output axes of a whole one."""
    out = np.zeros(x.shape)
    if pieces is None:
        inputs = x.ndim - outputs
        flat = x.reshape(int(np.prod(x.shape[:inputs])), -1)
        return (rms * np.sqrt(max(flat.shape)) * polar(flat)).reshape(x.shape)
    for piece, place in zip(pieces(x), pieces(out), strict=True):
        assert np.shares_memory(place, out)
        flat = piece.reshape(len(piece), -1)
        place[...] = rms * np.sqrt(max(flat.shape)) * polar(piece)
    return out


def muon(rules: mc.MatrixRules) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        mc.scale_by_muon(ns_method="svd", rules=rules),
        mc.scale_by_shape(consistent_rms=0.2, rules=rules),
    )


def matrices_only(params: Any, rules: mc.MatrixRules) -> optax.GradientTransformationExtraArgs:
    return optax.multi_transform({"muon": muon(rules), "adamw": optax.identity()}, rules.labels)


#: Blocks that have the same rules are one tree, and one program.
FAMILIES = {
    name: [case for case in CASES.values() if case.rules == CASES[name].rules]
    for name in (
        "linen, merged", "linen, split", "linen, heads", "llama, heads", "falcon, split",
        "own names, heads", "own names, gate by group",
    )
}  # fmt: skip


STACKED = [
    pytest.param(name, (2,), axis, marks=() if name == "linen, heads" else pytest.mark.slow)
    for name in FAMILIES
    for axis in (0, 1)
    if "own names" not in name  # those say nothing about stacked layers
]


@pytest.mark.parametrize(
    ("family", "stack", "scan_axis"), [*((name, (), 0) for name in FAMILIES), *STACKED]
)
def test_every_piece_is_a_matrix_of_its_own(family, stack, scan_axis):
    rules = mc.MatrixRules(scan_axis=scan_axis, **CASES[family].rules)
    container = "layers" if stack else "layers_0"
    grads = {
        f"model_{number}": tree_of(case.shapes, container, stack, scan_axis)
        for number, case in enumerate(FAMILIES[family])
    }
    tx: Any = matrices_only(grads, rules)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.asarray, grads), tx.init(grads), grads)
    for number, case in enumerate(FAMILIES[family]):
        for leaf, shape in case.shapes.items():
            got, given = updates[f"model_{number}"], grads[f"model_{number}"]
            for module in (container, "attn", *leaf.split("/")):
                got, given = got[module], given[module]
            if leaf.endswith("bias"):
                np.testing.assert_array_equal(got, given)
                continue
            outputs = 2 if len(shape) == 3 and not leaf.startswith(("out", "o_", "attn_v")) else 1
            layers = np.moveaxis(given, scan_axis, 0) if stack else given[None]
            expected = np.stack([by_hand(x, case.pieces.get(leaf), outputs, 0.2) for x in layers])
            expected = np.moveaxis(expected, 0, scan_axis) if stack else expected[0]
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=f"{number}: {leaf}")


@pytest.mark.parametrize("attention", ["split", "per_head"])
def test_muonclip_takes_the_rules_and_clips_beside_them(attention):
    params = jax.tree.map(jnp.asarray, tree_of(MAXTEXT_MLA, "layers_0"))
    rules = mc.MatrixRules(attention=attention)
    tx: Any = mc.muonclip(0.02, rules=rules)
    maxima = {"layers_0/attn": jnp.asarray([400.0, 1.0, 1.0, 1.0])}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, max_logits=maxima)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    config = mc.MuonClipConfig(learning_rate=0.02, rules=rules)
    assert hash(config) == hash(mc.MuonClipConfig(learning_rate=0.02, rules=rules))
