"""Queries and an output gate in one kernel, in every order that models have them in."""

from typing import Any

from muonclip_jax.heads.layouts import AttentionLayout, Projection
from tests.clipping.oracle import Case, heads_in, linear, normal, per_query


def _gated(interleaved: bool | str) -> dict[str, Any]:
    """A merged kernel: shapes do not tell where the gates are, so the layout is given."""

    def params(rng, s):
        return {
            "my_q": {"kernel": normal(rng, s.model, 2 * s.heads * s.head)},
            "my_k": {"kernel": normal(rng, s.model, s.kv_heads * s.head)},
        }

    def heads_of(p, x, s):
        y = linear(x, p["my_q"])
        if interleaved == "group":
            q = y.reshape(len(x), s.kv_heads, 2, -1, s.head)[:, :, 0]
            q = q.reshape(len(x), s.heads, s.head)
        elif interleaved:
            q = y.reshape(len(x), s.heads, 2, s.head)[:, :, 0]
        else:
            q = heads_in(y[:, : s.heads * s.head], s.heads)
        return q, per_query(heads_in(linear(x, p["my_k"]), s.kv_heads), s.heads)

    queries = Projection("my_q", ("query", "gate"), interleaved=interleaved)
    layout = AttentionLayout((queries, Projection("my_k", ("key",))))
    return {"params": params, "heads_of": heads_of, "blocks": [("attn$", layout)]}


def _found(query: str, key: str, out: str, bias: bool) -> dict[str, Any]:
    """A kernel with an axis for the heads, each twice as large as a key: found by itself."""

    def params(rng, s):
        p = {
            query: {"kernel": normal(rng, s.model, s.heads, 2 * s.head)},
            key: {"kernel": normal(rng, s.model, s.kv_heads, s.head)},
            out: {"kernel": normal(rng, s.heads, s.head, s.model)},
        }
        if bias:
            p[query]["bias"] = normal(rng, s.heads, 2 * s.head)
        return p

    def heads_of(p, x, s):
        q = heads_in(linear(x, p[query]), s.heads)[:, :, : s.head]
        return q, per_query(heads_in(linear(x, p[key]), s.kv_heads), s.heads)

    return {"params": params, "heads_of": heads_of}


def _smaller_values() -> dict[str, Any]:
    """No gate, though queries make twice what the output takes: values are half as large."""

    def params(rng, s):
        return {
            "query": {"kernel": normal(rng, s.model, s.heads, s.head)},
            "key": {"kernel": normal(rng, s.model, s.kv_heads, s.head)},
            "out": {"kernel": normal(rng, s.heads, s.head // 2, s.model)},
        }

    def heads_of(p, x, s):
        q = heads_in(linear(x, p["query"]), s.heads)
        return q, per_query(heads_in(linear(x, p["key"]), s.kv_heads), s.heads)

    return {"params": params, "heads_of": heads_of}


GATED = (
    Case("gate, interleaved", **_gated(True), own_keys=False),
    Case("gate, by group", **_gated("group"), own_keys=False),
    Case("gate, concatenated", **_gated(False), own_keys=False),
    Case("gate, found", **_found("query", "key", "out", bias=True), own_keys=False),
    Case("gate, found, own keys", **_found("q_proj", "k_proj", "o_proj", bias=False)),
    Case("smaller values", **_smaller_values(), own_keys=False),
)
