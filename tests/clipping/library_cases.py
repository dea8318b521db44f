"""Attention as libraries store it: NamedArrays of haliax, einsum kernels, low-rank adapters."""

from typing import Any

import numpy as np

from tests.clipping.oracle import Case, heads_in, normal, per_query, wide


def _grouped_params(rng, s) -> dict[str, Any]:
    """Levanter's Llama: `weight` is (outputs, inputs), query heads are on two axes."""
    group = s.heads // s.kv_heads
    return {
        "q_proj": {"weight": {"array": normal(rng, s.kv_heads, group, s.head, s.model)}},
        "k_proj": {"weight": {"array": normal(rng, s.kv_heads, s.head, s.model)}},
        "v_proj": {"weight": {"array": normal(rng, s.kv_heads, s.head, s.model)}},
        "o_proj": {"weight": {"array": normal(rng, s.model, s.heads, s.head)}},
    }


def _grouped_heads(p, x, s):
    q = np.einsum("te,kghe->tkgh", x, wide(p["q_proj"]["weight"]["array"]))
    k = np.einsum("te,khe->tkh", x, wide(p["k_proj"]["weight"]["array"]))
    return q.reshape(len(x), s.heads, s.head), per_query(k, s.heads)


def _haliax_fused_params(rng, s) -> dict[str, Any]:
    """Levanter's GPT-2: `weight` is (inputs, outputs), an array by its position in the node."""
    return {
        "c_attn": {
            "weight": [normal(rng, s.model, 3, s.heads, s.head)],
            "bias": [normal(rng, 3, s.heads, s.head)],
        },
        "c_proj": {"weight": [normal(rng, s.heads, s.head, s.model)]},
    }


def _haliax_fused_heads(p, x, s):
    y = np.einsum("te,ekhd->tkhd", x, wide(p["c_attn"]["weight"][0])) + wide(p["c_attn"]["bias"][0])
    return y[:, 0], y[:, 1]


def _key_values_params(rng, s) -> dict[str, Any]:
    """Gemma 4's global layers: the keys are the values."""
    return {
        "q_einsum": {"w": normal(rng, s.heads, s.model, s.head)},
        "k_einsum": {"w": normal(rng, s.kv_heads, s.model, s.head)},
        "attn_vec_einsum": {"w": normal(rng, s.heads, s.head, s.model)},
    }


def _key_values_heads(p, x, s):
    q = np.einsum("td,hdk->thk", x, wide(p["q_einsum"]["w"]))
    k = np.einsum("td,hdk->thk", x, wide(p["k_einsum"]["w"]))
    return q, per_query(k, s.heads)


def _nnx_around(kernel, a, b):
    return {"base_module": {"kernel": kernel}, "lora_a": a, "lora_b": b}


def _nnx_beside(kernel, a, b):
    return {"kernel": kernel, "lora": {"lora_a": a, "lora_b": b}}


def _qwix(kernel, a, b):
    return {"kernel": kernel, "kernel_lora_a": a, "kernel_lora_b": b}


def _peft(kernel, a, b):
    return {
        "base_layer": {"weight": kernel.T},
        "lora_A": {"default": {"weight": a.T}},
        "lora_B": {"default": {"weight": b.T}},
    }


def _levanter_lora(kernel, a, b):
    return {
        "wrapped": {"weight": {"array": kernel.T}},
        "lora": {"lora_A": {"weight": {"array": a.T}}, "lora_B": {"weight": {"array": b.T}}},
    }


def _adapted(store) -> dict[str, Any]:
    """A merged kernel with an adapter of rank 2 on queries and keys."""

    def params(rng, s):
        def module(heads):
            arrays = ((s.model, heads * s.head), (s.model, 2), (2, heads * s.head))
            return store(*(normal(rng, *shape) for shape in arrays))

        return {"q_proj": module(s.heads), "k_proj": module(s.kv_heads)}

    def heads_of(p, x, s):
        # The names are sorted so that kernel, A and B are told by their shapes alone.
        def apply(module, heads):
            arrays = [wide(leaf) for leaf in _leaves(module)]
            a = next(w for w in arrays if sorted(w.shape) == [2, s.model])
            b = next(w for w in arrays if sorted(w.shape) == [2, heads * s.head])
            w = next(w for w in arrays if w is not a and w is not b)
            a, w = (y if y.shape[0] == s.model else y.T for y in (a, w))
            b = b if b.shape[0] == 2 else b.T
            return heads_in(x @ (w + a @ b), heads)

        return apply(p["q_proj"], s.heads), per_query(apply(p["k_proj"], s.kv_heads), s.heads)

    return {"params": params, "heads_of": heads_of}


def _leaves(module) -> list[Any]:
    if not isinstance(module, dict):
        return [module]
    return [leaf for inner in module.values() for leaf in _leaves(inner)]


def _qwix_einsum_params(rng, s) -> dict[str, Any]:
    """tunix: kernels `(inputs, heads, size)` with the adapter of qwix."""
    return {
        name: {
            "w": normal(rng, s.model, heads, s.head),
            "w_lora_a": normal(rng, s.model, 3),
            "w_lora_b": normal(rng, 3, heads, s.head),
        }
        for name, heads in (("q_proj", s.heads), ("k_proj", s.kv_heads))
    }


def _qwix_einsum_heads(p, x, s):
    def apply(module):
        adapter = np.einsum("dr,rhk->dhk", wide(module["w_lora_a"]), wide(module["w_lora_b"]))
        return np.einsum("td,dhk->thk", x, wide(module["w"]) + adapter)

    return apply(p["q_proj"]), per_query(apply(p["k_proj"]), s.heads)


LIBRARIES = (
    Case("haliax, grouped", _grouped_params, _grouped_heads, own_keys=False),
    Case("haliax, fused", _haliax_fused_params, _haliax_fused_heads),
    Case("keys that are values", _key_values_params, _key_values_heads, key_heads=2),
    Case("nnx LoRA around", **_adapted(_nnx_around)),
    Case("nnx LoRA beside", **_adapted(_nnx_beside), own_keys=False),
    Case("qwix LoRA", **_adapted(_qwix)),
    Case("PEFT LoRA", **_adapted(_peft), own_keys=False),
    Case("haliax LoRA", **_adapted(_levanter_lora)),
    Case("qwix LoRA, einsum", _qwix_einsum_params, _qwix_einsum_heads, own_keys=False),
)
