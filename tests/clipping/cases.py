"""Attention of every kind in float64 NumPy: parameters, and queries and keys head by head.

Each case makes a tree of parameters and, independently of the library, the function from that
tree to `q, k`, both `(tokens, query heads, size)`: what the model would multiply. A head's
largest logit is then the largest `q . k / sqrt(size)`.
"""

import numpy as np

from muonclip_jax.heads.layouts import AttentionLayout, Projection
from tests.clipping.gated_cases import GATED
from tests.clipping.library_cases import LIBRARIES
from tests.clipping.oracle import Array, Case, heads_in as _heads, linear, normal, per_query, wide
from tests.clipping.positions_cases import POSITIONS


def _separate(query: str, key: str, merged: bool, bias: bool):
    def params(rng, s):
        def module(heads):
            features = (heads * s.head,) if merged else (heads, s.head)
            kernel = {"kernel": normal(rng, s.model, *features)}
            return {**kernel, "bias": normal(rng, *features)} if bias else kernel

        return {query: module(s.heads), key: module(s.kv_heads)}

    def heads_of(p, x, s):
        q, k = _heads(linear(x, p[query]), s.heads), _heads(linear(x, p[key]), s.kv_heads)
        return q, per_query(k, s.heads)

    return {"params": params, "heads_of": heads_of}


def _torch(merged: bool):
    def params(rng, s):
        sizes = {"query_proj": s.heads, "key_proj": s.kv_heads}
        shapes = {
            n: (h * s.head, s.model) if merged else (h, s.head, s.model) for n, h in sizes.items()
        }
        return {name: {"weight": normal(rng, *shape)} for name, shape in shapes.items()}

    def heads_of(p, x, s):
        q, k = (
            _heads(x @ wide(p[name]["weight"]).reshape(-1, s.model).T, heads)
            for name, heads in (("query_proj", s.heads), ("key_proj", s.kv_heads))
        )
        return q, per_query(k, s.heads)

    return {"params": params, "heads_of": heads_of}


def _fused(name: str, order: str, split_axes: bool = False, transposed: bool = False):
    """A fused kernel, its output projection beside it where that tells the size of a head."""

    def params(rng, s):
        total = (s.heads + 2 * s.kv_heads) * s.head
        if split_axes:
            kernel, bias = normal(rng, s.model, 3, s.heads, s.head), normal(rng, 3, s.heads, s.head)
        else:
            kernel, bias = normal(rng, s.model, total), normal(rng, total)
        out = normal(rng, s.heads * s.head, s.model)
        if transposed:
            kernel, out = kernel.T, normal(rng, s.heads * s.head, s.heads * s.head)
        return {name: {"kernel": kernel, "bias": bias}, "c_proj": {"kernel": out}}

    def heads_of(p, x, s):
        module = dict(p[name])
        if transposed:
            module["kernel"] = np.asarray(module["kernel"]).T
        y = linear(x, module)
        if order == "concatenated":
            q, k, _ = np.split(y, [s.heads * s.head, (s.heads + s.kv_heads) * s.head], axis=1)
            return _heads(q, s.heads), per_query(_heads(k, s.kv_heads), s.heads)
        group = s.heads // s.kv_heads
        rows = y.reshape(len(x), s.kv_heads, group + 2, s.head)
        q = rows[:, :, :group].reshape(len(x), s.heads, s.head)
        return q, per_query(rows[:, :, group], s.heads)

    return {"params": params, "heads_of": heads_of}


def _fused_kv(query: str, key_value: str, interleaved: bool = False):
    def params(rng, s):
        return {
            query: {"kernel": normal(rng, s.model, s.heads * s.head)},
            key_value: {"kernel": normal(rng, s.model, 2 * s.kv_heads * s.head)},
        }

    def heads_of(p, x, s):
        k = _heads(linear(x, p[key_value]), s.kv_heads if interleaved else 2 * s.kv_heads)
        k = k[..., : s.head] if interleaved else k[:, : s.kv_heads]
        return _heads(linear(x, p[query]), s.heads), per_query(k, s.heads)

    return {"params": params, "heads_of": heads_of}


def _gemma_params(rng, s):
    return {
        "q_einsum": {"w": normal(rng, s.heads, s.model, s.head)},
        "kv_einsum": {"w": normal(rng, 2, s.kv_heads, s.model, s.head)},
    }


def _gemma_heads(p, x, s):
    q = np.einsum("td,hdk->thk", x, wide(p["q_einsum"]["w"]))
    k = np.einsum("td,hdk->thk", x, wide(p["kv_einsum"]["w"])[0])
    return q, per_query(k, s.heads)


def _latent(
    query: str,
    down: str,
    up: str,
    merged: bool,
    low_rank: str | None = None,
    values: int | None = None,
):
    """Latent attention: keys from a latent, one rotary key for all heads; values beside them."""

    def params(rng, s):
        shape = (lambda n: (s.heads * n,)) if merged else (lambda n: (s.heads, n))
        inputs = s.latent if low_rank else s.model
        p = {
            query: {"kernel": normal(rng, inputs, *shape(s.head))},
            down: {"kernel": normal(rng, s.model, s.latent + s.rope)},
            up: {
                "kernel": normal(
                    rng, s.latent, *shape(s.head - s.rope + (s.value if values is None else values))
                )
            },
            "kv_norm": {"scale": np.ones(s.latent, np.float32)},
        }
        if low_rank:
            p[low_rank] = {"kernel": normal(rng, s.model, s.latent)}
            p["q_norm"] = {"scale": np.ones(s.latent, np.float32)}
        return p

    def heads_of(p, x, s):
        nope = s.head - s.rope
        inside = linear(x, p[low_rank]) if low_rank else x
        q = _heads(linear(inside, p[query]), s.heads)
        latent, rotary = np.split(linear(x, p[down]), [s.latent], axis=1)
        k = _heads(linear(latent, p[up]), s.heads)[..., :nope]
        rotary = np.repeat(rotary[:, None], s.heads, axis=1)
        return q, np.concatenate([k, rotary], axis=-1)

    return {"params": params, "heads_of": heads_of}


def _latent_parts_params(rng, s):
    nope = s.head - s.rope
    return {
        "q_nope": {"kernel": normal(rng, s.model, s.heads, nope)},
        "q_rope": {"kernel": normal(rng, s.model, s.heads, s.rope)},
        "k_nope": {"kernel": normal(rng, s.model, s.heads, nope)},
        "k_rope": {"kernel": normal(rng, s.model, s.rope)},
    }


def _latent_parts_heads(p, x, s):
    q = [_heads(linear(x, p[name]), s.heads) for name in ("q_nope", "q_rope")]
    rotary = np.repeat(linear(x, p["k_rope"])[:, None], s.heads, axis=1)
    k = [_heads(linear(x, p["k_nope"]), s.heads), rotary]
    return np.concatenate(q, -1), np.concatenate(k, -1)


def _rms(y: Array) -> Array:
    return y / np.sqrt((y**2).mean(-1, keepdims=True))


def _gains(shared_key_gain: bool):
    """Normalised over all heads, with a gain for every feature, as in OLMo 2."""

    def params(rng, s):
        p = _separate("q_proj", "k_proj", merged=True, bias=False)["params"](rng, s)
        p["q_norm"] = {"scale": normal(rng, s.heads * s.head)}
        p["k_norm"] = {"scale": normal(rng, s.head if shared_key_gain else s.kv_heads * s.head)}
        return p

    def heads_of(p, x, s):
        q = _heads(_rms(linear(x, p["q_proj"])) * wide(p["q_norm"]["scale"]), s.heads)
        if shared_key_gain:
            k = _rms(_heads(linear(x, p["k_proj"]), s.kv_heads)) * wide(p["k_norm"]["scale"])
        else:
            k = _rms(linear(x, p["k_proj"])) * wide(p["k_norm"]["scale"])
        return q, per_query(_heads(k.reshape(len(x), -1), s.kv_heads), s.heads)

    return {"params": params, "heads_of": heads_of}


def _adapter_params(rng, s):
    p = _separate("q_proj", "k_proj", merged=True, bias=True)["params"](rng, s)
    p["q_proj"] |= {
        "lora_a": normal(rng, s.model, 2),
        "lora_b": normal(rng, 2, s.heads * s.head),
    }
    return p


def _adapter_heads(p, x, s):
    module = p["q_proj"]
    q = linear(x, module) + x @ wide(module["lora_a"]) @ wide(module["lora_b"])
    return _heads(q, s.heads), _heads(linear(x, p["k_proj"]), s.kv_heads)


def _query_alone(p, x, s):
    """Keys that belong to another layer, as here the first tokens themselves."""
    k = np.repeat(x[:, None, : s.head], s.heads, axis=1)
    return _heads(linear(x, p["q_proj"]), s.heads), k


CASES = (
    Case("linen", **_separate("query", "key", merged=False, bias=True)),
    Case("linen without bias", **_separate("query", "key", merged=False, bias=False)),
    Case("grouped", **_separate("query", "key", merged=False, bias=True), own_keys=False),
    Case("merged", **_separate("q_proj", "k_proj", merged=True, bias=True)),
    Case("merged, grouped", **_separate("wq", "wk", merged=True, bias=True), own_keys=False),
    Case("multi-query", **_separate("query", "key", merged=False, bias=True), key_heads=1),
    Case("diffusion", **_separate("to_q", "to_k", merged=True, bias=False)),
    Case(
        "other names",
        **_separate("ask", "answer", merged=False, bias=True),
        blocks=AttentionLayout((Projection("ask", ("query",)), Projection("answer", ("key",)))),
        own_keys=False,
    ),
    Case("transposed", **_torch(merged=True), own_keys=False),
    Case("transposed, an axis for heads", **_torch(merged=False)),
    Case("gpt2, transposed", **_fused("c_attn", "concatenated", transposed=True)),
    Case("gpt2", **_fused("c_attn", "concatenated")),
    Case("phi3", **_fused("qkv_proj", "concatenated"), own_keys=False),
    Case("timm", **_fused("qkv", "concatenated")),
    Case("maxtext fused", **_fused("qkv_proj", "concatenated", split_axes=True)),
    Case("bloom", **_fused("query_key_value", "interleaved")),
    Case("falcon", **_fused("query_key_value", "interleaved"), own_keys=False),
    *GATED,
    *POSITIONS,
    *LIBRARIES,
    Case("fused kv", **_fused_kv("to_q", "to_kv"), own_keys=False),
    Case(
        "fused kv, head by head",
        **_fused_kv("my_q", "my_kv", interleaved=True),
        blocks=AttentionLayout(
            (
                Projection("my_q", ("query",)),
                Projection("my_kv", ("key", "value"), interleaved=True),
            )
        ),
    ),
    Case("gemma", _gemma_params, _gemma_heads, own_keys=False),
    Case("maxtext latent", **_latent("wq_b", "wkv_a", "wkv_b", False, low_rank="wq_a")),
    Case("maxtext latent, full query", **_latent("query", "wkv_a", "wkv_b", False)),
    Case(
        "deepseek",
        **_latent("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", True, low_rank="q_a_proj"),
    ),
    Case("deepseek lite", **_latent("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", True)),
    Case(
        "latent, separate k and v",
        **_latent("wq_b", "wkv_a", "wk_b", False, low_rank="wq_a", values=0),
    ),
    Case("latent, separate parts", _latent_parts_params, _latent_parts_heads),
    Case("gains", **_gains(shared_key_gain=False)),
    Case("gains, grouped", **_gains(shared_key_gain=False), own_keys=False),
    Case("gains, key's shared", **_gains(shared_key_gain=True)),
    Case(
        "query alone",
        lambda rng, s: {"q_proj": {"kernel": normal(rng, s.model, s.heads * s.head)}},
        _query_alone,
        blocks=("attn$", AttentionLayout((Projection("q_proj", ("query_alone",)),))),
    ),
    Case("adapter", _adapter_params, _adapter_heads),
)
