"""Attention of every kind in float64 NumPy: its leaves, and its queries and keys head by head.

Nothing here is the library's: a head's maximum is the largest `q . k / sqrt(size)`.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax.heads.layouts import AttentionLayout, Projection

Shapes = dict[str, tuple[int, ...]]
Leaves = dict[str, np.ndarray]
#: Queries and keys, `(tokens, heads, size)`, of leaves, tokens and sizes.
HeadsOf = Callable[[Leaves, np.ndarray, Any], tuple[np.ndarray, np.ndarray]]


class Case(NamedTuple):
    """One kind of attention."""

    name: str
    shapes: Callable[[Any], Shapes]
    heads_of: HeadsOf
    own_keys: bool = True  # as many keys as queries
    blocks: Any = None
    key_heads: int | None = None  # where that is part of the case

    def sizes(self, model: int = 10, heads: int = 4, kv_heads: int = 2, head: int = 6) -> Any:
        """Model d, heads n, keys m, queries a key g, head h, half e, rotary r, rest p, latent l."""
        m = self.key_heads or (heads if self.own_keys else kv_heads)
        s = SimpleNamespace(d=model, n=heads, m=m, g=heads // m, h=head, e=head // 2, r=2, l=5)
        # Beside them fused heads t, a latent and its rotary part c, keys and values of a head u.
        s.t, s.c, s.p, s.u = s.n + 2 * s.m, s.l + s.r, s.h - s.r, s.h - s.r + 5
        return s

    def params(self, s: Any, seed: int) -> Any:
        """Draws the block's leaves; a key "0" is a position in a list."""
        rng = np.random.default_rng([len(self.name), seed])
        tree: dict[str, Any] = {}
        for path, shape in self.shapes(s).items():
            *parents, name = path.split("/")
            inside = tree
            for parent in parents[: -1 if name == "0" else None]:
                inside = inside.setdefault(parent, {})
            leaf = rng.standard_normal(shape).astype(np.float32)
            inside |= {parents[-1]: [leaf]} if name == "0" else {name: leaf}
        return tree

    def queries_and_keys(self, block: Any, x: np.ndarray, s: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns both as `(tokens, query heads, size)`, a shared key once for each query."""
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).astype(
                np.float64
            )
            for path, leaf in jax.tree_util.tree_flatten_with_path(block)[0]
        }
        q, k = self.heads_of(leaves, x, s)
        return q, np.repeat(k, s.n // k.shape[1], axis=1)

    def maxima(self, block: Any, x: np.ndarray, s: Any) -> np.ndarray:
        q, k = self.queries_and_keys(block, x, s)
        return np.einsum("thd,shd->hts", q, k).max((1, 2)) / np.sqrt(q.shape[-1])


def _leaves(text: str) -> Callable[[Any], Shapes]:
    """Reads "path size size, ..."; a size is a product of letters of `Case.sizes` and numbers."""

    def shapes(s: Any) -> Shapes:
        def size(product: str) -> int:
            return math.prod(int(f) if f.isdigit() else getattr(s, f) for f in product.split("*"))

        rows = (row.split() for row in text.split(","))
        return {path: tuple(map(size, sizes)) for path, *sizes in rows}

    return shapes


def _linear(w: Leaves, name: str, x: np.ndarray, heads: int = 1) -> np.ndarray:
    """Applies `(inputs, *features)` and a bias, as `(tokens, heads, size)`."""
    kernel = w[f"{name}/kernel"]
    y = x @ kernel.reshape(len(kernel), -1) + w.get(f"{name}/bias", np.zeros(1)).reshape(-1)
    return y.reshape(len(x), heads, -1)


def _separate(q: str, k: str, merged: bool = False) -> tuple[Any, HeadsOf]:
    rows = f"{q}/kernel d n h, {k}/kernel d m h, {q}/bias n h, {k}/bias m h"
    rows = rows.replace(" h", "*h") if merged else rows
    return _leaves(rows), lambda w, x, s: (_linear(w, q, x, s.n), _linear(w, k, x, s.m))


def _transposed(w: Leaves, x: np.ndarray, s: Any) -> Any:
    kernels = (w[f"{name}/weight"].reshape(-1, s.d) for name in ("query_proj", "key_proj"))
    return tuple((x @ w.T).reshape(len(x), -1, s.h) for w in kernels)


def _fused(name: str, interleaved: bool = False) -> tuple[Any, HeadsOf]:
    """A fused kernel, its output projection beside it where that tells the size of a head."""

    def heads_of(w: Leaves, x: np.ndarray, s: Any) -> Any:
        if not interleaved:
            y = _linear(w, name, x, s.n + 2 * s.m)
            return y[:, : s.n], y[:, s.n : s.n + s.m]
        rows = _linear(w, name, x).reshape(len(x), s.m, s.g + 2, s.h)
        return rows[:, :, : s.g].reshape(len(x), s.n, s.h), rows[:, :, s.g]

    return _leaves(f"{name}/kernel d t*h, {name}/bias t*h, c_proj/kernel n*h d"), heads_of


def _fused_kv(q: str, kv: str, interleaved: bool = False) -> tuple[Any, HeadsOf]:
    def heads_of(w: Leaves, x: np.ndarray, s: Any) -> Any:
        k = _linear(w, kv, x, s.m if interleaved else 2 * s.m)
        return _linear(w, q, x, s.n), k[..., : s.h] if interleaved else k[:, : s.m]

    return _leaves(f"{q}/kernel d n*h, {kv}/kernel d 2*m*h"), heads_of


def _latent(
    q: str, down: str, up: str, merged: bool, low_rank: str = "", keys: str = "u"
) -> tuple[Any, HeadsOf]:
    """Latent attention: keys from a latent, one rotary key for all heads; values beside them."""
    joint, inputs = "*" if merged else " ", "l" if low_rank else "d"
    rows = f"{q}/kernel {inputs} n{joint}h, {down}/kernel d c, {up}/kernel l n{joint}{keys}"
    rows += f", {low_rank}/kernel d l, q_norm/scale l" if low_rank else ""

    def heads_of(w: Leaves, x: np.ndarray, s: Any) -> Any:
        latent, rotary = np.split(_linear(w, down, x)[:, 0], [s.l], axis=1)
        k = _linear(w, up, latent, s.n)[..., : s.p]
        rotary = np.repeat(rotary[:, None], s.n, axis=1)
        inside = _linear(w, low_rank, x)[:, 0] if low_rank else x
        return _linear(w, q, inside, s.n), np.concatenate([k, rotary], axis=-1)

    return _leaves(f"{rows}, kv_norm/scale l"), heads_of


def _latent_parts(w: Leaves, x: np.ndarray, s: Any) -> Any:
    rotary = np.repeat(_linear(w, "k_rope", x), s.n, axis=1)
    q = np.concatenate([_linear(w, name, x, s.n) for name in ("q_nope", "q_rope")], -1)
    return q, np.concatenate([_linear(w, "k_nope", x, s.n), rotary], -1)


def _gains(shared_key_gain: bool) -> tuple[Any, HeadsOf]:
    """Normalised over all heads, with a gain for every feature, as in OLMo 2."""
    gain = "h" if shared_key_gain else "m*h"
    rows = f"q_proj/kernel d n*h, k_proj/kernel d m*h, q_norm/scale n*h, k_norm/scale {gain}"

    def normed(w: Leaves, x: np.ndarray, role: str, heads: int) -> np.ndarray:
        y = _linear(w, f"{role}_proj", x, heads)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True))
        return y * w[f"{role}_norm/scale"]

    def heads_of(w: Leaves, x: np.ndarray, s: Any) -> Any:
        q = normed(w, x, "q", 1).reshape(len(x), s.n, s.h)
        return q, normed(w, x, "k", s.m if shared_key_gain else 1).reshape(len(x), s.m, s.h)

    return _leaves(rows), heads_of


def _adapted(
    *paths: str, transposed: bool = False, only: str = "", joint: str = "*"
) -> tuple[Any, HeadsOf]:
    """A kernel with an adapter of rank 2 on queries and keys, or on one of them."""
    rows = []
    for name, heads in (("q_proj", "n"), ("k_proj", "m")):
        features = f"{heads}{joint}h"
        for path, sizes in zip(paths, (("d", features), ("d", "2"), ("2", features)), strict=True):
            if path == paths[0] or name.startswith(only):
                rows.append(f"{name}/{path} {' '.join(sizes[::-1] if transposed else sizes)}")

    def heads_of(w: Leaves, x: np.ndarray, s: Any) -> tuple[np.ndarray, np.ndarray]:
        def project(name: str, heads: int) -> np.ndarray:
            kernels = (w.get(f"{name}/{path}", np.zeros((1, 1))) for path in paths)
            kernel, a, b = (leaf.T if transposed else leaf for leaf in kernels)
            return np.tensordot(x, kernel + np.tensordot(a, b, 1), 1).reshape(len(x), heads, -1)

        return project("q_proj", s.n), project("k_proj", s.m)

    return _leaves(",".join(rows)), heads_of


def _gate(interleaved: Any) -> tuple[Any, HeadsOf, bool, Any]:
    """Queries and a gate in a merged kernel: shapes do not tell which is which."""

    def heads_of(w: Leaves, x: np.ndarray, s: Any) -> Any:
        groups = {True: s.n, "group": s.m, False: 1}[interleaved]
        q = _linear(w, "my_q", x).reshape(len(x), groups, 2, s.n // groups, s.h)[:, :, 0]
        return q.reshape(len(x), s.n, s.h), _linear(w, "my_k", x, s.m)

    queries = Projection("my_q", ("query", "gate"), interleaved=interleaved)
    layout = AttentionLayout((queries, Projection("my_k", ("key",))))
    shapes = _leaves("my_q/kernel d 2*n*h, my_k/kernel d m*h")
    return shapes, heads_of, False, [("attn$", layout)]


def _found(q: str, k: str, out: str, queries: str, outputs: str) -> tuple[Any, HeadsOf]:
    """Queries that are longer than keys hold a gate; longer than outputs, values are shorter."""
    rows = f"{q}/kernel d n {queries}, {k}/kernel d m h, {out}/kernel n {outputs} d"
    rows += f", {q}/bias n {queries}" if q == "query" else ""
    return _leaves(rows), lambda w, x, s: (_linear(w, q, x, s.n)[..., : s.h], _linear(w, k, x, s.m))


def _layout(q: str, k: str, *roles: str, **keywords: Any) -> AttentionLayout:
    return AttentionLayout(
        (Projection(q, ("query",)), Projection(k, roles or ("key",), **keywords))
    )


def _by(q: str, k: str, *paths: str) -> HeadsOf:
    """Applies an einsum to two leaves."""
    return lambda w, x, s: tuple(
        np.einsum(each, x, w[path]).reshape(len(x), -1, s.h)
        for each, path in zip((q, k), paths, strict=True)
    )


_A = "/weight/array"
CASES = (
    Case("linen", *_separate("query", "key")),
    Case("grouped", *_separate("query", "key"), False),
    Case("merged", *_separate("q_proj", "k_proj", merged=True)),
    Case("merged, grouped", *_separate("wq", "wk", merged=True), False),
    Case("multi-query", *_separate("query", "key"), key_heads=1),
    Case("other names", *_separate("ask", "answer"), False, _layout("ask", "answer")),
    Case(
        "transposed", _leaves("query_proj/weight n*h d, key_proj/weight m*h d"), _transposed, False
    ),
    Case(
        "transposed, an axis for heads",
        *(_leaves("query_proj/weight n h d, key_proj/weight m h d"), _transposed),
    ),
    Case(
        "gpt2, transposed",
        _leaves("c_attn/kernel t*h d, c_attn/bias t*h, c_proj/kernel n*h n*h"),
        lambda w, x, s: _fused("c_attn")[1](w | {"c_attn/kernel": w["c_attn/kernel"].T}, x, s),
    ),
    Case("gpt2", *_fused("c_attn")),
    Case("phi3", *_fused("qkv_proj"), False),
    Case(
        "maxtext fused",
        _leaves("qkv_proj/kernel d 3 n h, qkv_proj/bias 3 n h, c_proj/kernel n*h d"),
        _fused("qkv_proj")[1],
    ),
    Case("bloom", *_fused("query_key_value", interleaved=True)),
    Case("falcon", *_fused("query_key_value", interleaved=True), False),
    Case("gate, interleaved", *_gate(True)),
    Case("gate, by group", *_gate("group")),
    Case("gate, concatenated", *_gate(False)),
    Case("gate, found", *_found("query", "key", "out", "2*h", "h"), False),
    Case("gate, found, own keys", *_found("q_proj", "k_proj", "o_proj", "2*h", "h")),
    Case("smaller values", *_found("query", "key", "out", "h", "e"), False),
    Case(  # Levanter's Llama: outputs before inputs, query heads on two axes
        "haliax, grouped",
        _leaves(f"q_proj{_A} m g h d, k_proj{_A} m h d, v_proj{_A} m h d, o_proj{_A} d n h"),
        _by("te,kghe->tkgh", "te,khe->tkh", f"q_proj{_A}", f"k_proj{_A}"),
        own_keys=False,
    ),
    Case(  # Levanter's GPT-2: an array by its position in the node
        "haliax, fused",
        _leaves("c_attn/weight/0 d 3 n h, c_attn/bias/0 3 n h, c_proj/weight/0 n h d"),
        lambda w, x, _: tuple(
            np.tensordot(x, w["c_attn/weight/0"][:, i], 1) + w["c_attn/bias/0"][i] for i in (0, 1)
        ),
    ),
    Case(  # Gemma 4's global layers
        "keys that are values",
        _leaves("q_einsum/w n d h, k_einsum/w m d h, attn_vec_einsum/w n h d"),
        _by("td,hdk->thk", "td,hdk->thk", "q_einsum/w", "k_einsum/w"),
        key_heads=2,
    ),
    Case("nnx LoRA around", *_adapted("base_module/kernel", "lora_a", "lora_b")),
    Case("nnx LoRA beside", *_adapted("kernel", "lora/lora_a", "lora/lora_b"), False),
    Case("LoRA of queries alone", *_adapted("kernel", "lora_a", "lora_b", only="q")),
    Case("LoRA of keys alone", *_adapted("kernel", "lora_a", "lora_b", only="k")),
    Case("qwix LoRA", *_adapted("kernel", "kernel_lora_a", "kernel_lora_b")),
    Case(
        "PEFT LoRA",
        *_adapted(
            *("base_layer/weight", "lora_A/default/weight", "lora_B/default/weight"),
            transposed=True,
        ),
        own_keys=False,
    ),
    Case(
        "haliax LoRA",
        *_adapted(*(f"wrapped{_A}", f"lora/lora_A{_A}", f"lora/lora_B{_A}"), transposed=True),
    ),
    Case("qwix LoRA, einsum", *_adapted("w", "w_lora_a", "w_lora_b", joint=" "), False),
    Case("fused kv", *_fused_kv("to_q", "to_kv"), False),
    Case(
        "fused kv, head by head",
        *_fused_kv("my_q", "my_kv", interleaved=True),
        blocks=_layout("my_q", "my_kv", "key", "value", interleaved=True),
    ),
    Case(
        "gemma",
        _leaves("q_einsum/w n d h, kv_einsum/w 2 m d h"),
        lambda w, x, _: tuple(
            np.einsum("td,hdk->thk", x, y) for y in (w["q_einsum/w"], w["kv_einsum/w"][0])
        ),
        own_keys=False,
    ),
    Case(
        "praxis",
        _leaves("combined_qkv/w 3 d n h, combined_qkv/b 3 n h, post/w d n h"),
        lambda w, x, _: tuple(
            np.tensordot(x, w["combined_qkv/w"][i], 1) + w["combined_qkv/b"][i] for i in (0, 1)
        ),
    ),
    Case("maxtext latent", *_latent("wq_b", "wkv_a", "wkv_b", False, "wq_a")),
    Case("deepseek", *_latent("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", True, "q_a_proj")),
    Case("latent, separate k and v", *_latent("wq_b", "wkv_a", "wk_b", False, "wq_a", "p")),
    Case(
        "latent, separate parts",
        _leaves("q_nope/kernel d n p, q_rope/kernel d n r, k_nope/kernel d n p, k_rope/kernel d r"),
        _latent_parts,
    ),
    Case("gains", *_gains(shared_key_gain=False)),
    Case("gains, grouped", *_gains(shared_key_gain=False), False),
    Case("gains, key's shared", *_gains(shared_key_gain=True)),
    Case(  # whose keys are another layer's, here the first features of the tokens
        "query alone",
        _leaves("q_proj/kernel d n*h"),
        lambda w, x, s: (_linear(w, "q_proj", x, s.n), x[:, None, : s.h]),
        blocks=("attn$", AttentionLayout((Projection("q_proj", ("query_alone",)),))),
    ),
)


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    """Returns the same numbers for the same shape and seed, whatever ran before."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def attention(heads=4, kv_heads=None, d=6, hd=8, bias=True, stack=(), dtype=jnp.float32):
    """Draws the leaves of Flax's attention."""

    def projection(count, seed):
        kernel = {"kernel": normal(*stack, d, count, hd, dtype=dtype, seed=seed)}
        shift = {"bias": normal(*stack, count, hd, dtype=dtype, seed=seed)}
        return kernel | shift if bias else kernel

    key_heads = kv_heads or heads
    return {
        name: projection(count, seed)
        for seed, (name, count) in enumerate(
            {"query": heads, "key": key_heads, "value": key_heads}.items()
        )
    } | {"out": {"kernel": normal(*stack, heads, hd, d, dtype=dtype)}}
