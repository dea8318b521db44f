"""Attention layouts: which features of which projection belong to which head.

A clip scales the weights of a head's queries and keys. Grouped-query attention has fewer key heads,
each shared by a group of query heads. A fused projection produces queries, keys and values,
concatenated (GPT-2), interleaved by head (BLOOM), or by group (Falcon). In latent attention
(DeepSeek, Kimi) each head has its own key without rotary positions, and all share a rotary one.

A layout is a tuple of `Projection`s, and a projection is a tuple of parts, each with a role:

| role | heads | scaled by |
|---|---|---|
| "query" | query heads | gamma ** alpha; gamma if heads share the key |
| "query_alone" | query heads | gamma, because all heads share its key |
| "key" | key heads | gamma ** (1 - alpha); nothing if heads share it |
| "gate" | query heads | nothing |
| "value" | key heads | nothing |

Heads may be one axis, several (`(key heads, group, size)`, as in haliax) or merged with their
features; axes are used in order. Rotary embeddings commute with scaling a head. A layout contains
sizes only if they cannot be inferred from shapes; the number of query heads comes from the maxima.
"""

import dataclasses
import re
from collections.abc import Iterable

#: Which head count a role has: True for the query heads, False for the key heads.
ROLES = {"query": True, "query_alone": True, "key": False, "gate": True, "value": False}
#: Roles that a clip multiplies.
SCALED = ("query", "query_alone", "key")
_ORDERS = (False, True, "group")


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of an attention block and the roles of its output features.

    Args:
        path: Path of the projection relative to the block: "query", "c_attn", "core/wq".
        parts: Roles of its output features, in order.
        interleaved: False if the parts are concatenated, each with all its heads. True if they are
            interleaved by head, or by group where several queries share a key. "group" if queries
            and gates are interleaved by key head.
        sizes: Features per head of each part; None infers them from shapes.
        input_axis: The kernel's input axis, without stacked axes. None uses the leaf's name: the
            first for "kernel" and "w", the last for "weight", as in PyTorch and Equinox. With a
            tuple of candidates, shapes decide.

    Raises:
        ValueError: If a role or an order is unknown, or the sizes do not match the parts.

    Example:
        >>> Projection("Wqkv", ("query", "key", "value"), interleaved=True).parts
        ('query', 'key', 'value')
    """

    path: str
    parts: tuple[str, ...]
    interleaved: bool | str = False
    sizes: tuple[int, ...] | None = None
    input_axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("parts", "sizes", "input_axis"):
            if isinstance(value := getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(value))
        wrong = None
        if not self.parts or not ROLES.keys() >= set(self.parts):
            wrong = f"the parts {self.parts}; each must be one of {', '.join(map(repr, ROLES))}"
        elif self.interleaved not in _ORDERS:
            wrong = f"interleaved={self.interleaved!r}; it must be one of {str(_ORDERS)[1:-1]}"
        elif self.sizes is not None and len(self.sizes) != len(self.parts):
            wrong = f"{len(self.parts)} parts and {len(self.sizes)} sizes; give one size per part, "
            wrong += "the size of one of its heads"
        if wrong is not None:
            raise ValueError(f"Projection {self.path!r} has {wrong}.")


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """The position of the heads in the weights of one kind of attention block.

    Args:
        projections: The projections that produce queries and keys.
        name: Name of the layout in `describe_attention`.
        head_dim: Size of a query and key head, if it cannot be inferred from shapes.
        kv_heads: Number of key heads, if it cannot be inferred from shapes.
        stack_axes: Axes over which every leaf of the block is stacked (layers, pipeline stages).
            None infers them from shapes; if several fit, the first ones.
        latent: For latent attention, the projections `(down, up)` of keys. `down` produces the
            latent and the shared rotary key, so the rotary size is its size minus the latent's.

    Raises:
        ValueError: If no projection produces a query.

    Example:
        >>> layout = AttentionLayout(
        ...     (
        ...         Projection("my_q", ("query", "gate"), interleaved=True),
        ...         Projection("my_k", ("key",)),
        ...     )
        ... )
        >>> layout.name
        'custom'
    """

    projections: tuple[Projection, ...]
    name: str = "custom"
    head_dim: int | None = None
    kv_heads: int | None = None
    stack_axes: tuple[int, ...] | None = None
    latent: tuple[str, str] | None = None
    # What a block with this layout must have, whether every query head has its own key as in latent
    # attention, and the first projection that makes queries.
    paths: tuple[str, ...] = dataclasses.field(init=False, repr=False, compare=False)
    own_keys: bool = dataclasses.field(init=False, repr=False, compare=False)
    query: Projection = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        projections, axes = tuple(self.projections), self.stack_axes
        axes = (axes,) if isinstance(axes, int) else axes
        query = next((p for p in projections if {"query", "query_alone"} & set(p.parts)), None)
        if query is None:
            raise ValueError(
                f"Attention layout {self.name!r} has no query. Give it a projection that produces "
                "one, as in Projection('q_proj', ('query',))."
            )
        for name, value in {
            "projections": projections,
            "stack_axes": None if axes is None else tuple(axes),
            "paths": (*(p.path for p in projections), *(self.latent or ())),
            "own_keys": {x for p in projections for x in p.parts} >= {"query", "query_alone"},
            "query": query,
        }.items():
            object.__setattr__(self, name, value)


def spelling(name: str) -> str:
    """Returns a name in one spelling: "out_proj" for "out-proj", "moe_block_0" for "MoeBlock_0"."""
    name = name.replace("MoE", "Moe").strip("_")
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return name.lower().replace("-", "_")


def _layout(
    name: str,
    projections: str,
    interleaved: bool = False,
    input_axis: int | tuple[int, ...] | None = None,
    latent: tuple[str, str] | None = None,
) -> AttentionLayout:
    """Reads `projections`: "path: roles of its parts; path: roles"."""
    pairs = (projection.split(": ") for projection in projections.split("; "))
    made = (Projection(p, tuple(x.split()), interleaved, None, input_axis) for p, x in pairs)
    return AttentionLayout(tuple(made), name, latent=latent)


def separate(query: str, key: str) -> AttentionLayout:
    """Returns the layout of a query and a key projection with these names."""
    return _layout("separate q and k", f"{query}: query; {key}: key")


#: A query, a key and a value projection that stand side by side, as libraries call them.
QUERY_KEY_VALUE: tuple[tuple[str, str, str], ...] = tuple(
    (form.format(query), form.format(key), form.format(value))
    for query, key, value, forms in (
        ("query", "key", "value", "{} {}_proj {}_projection {}_linear {}_dense {}_w"),
        ("q", "k", "v", "{} c_{} proj_{} {}_proj {}_lin {}_linear {}_dense"),
        ("q", "k", "v", "w{} w_{} W{} W_{} to_{} linear_{}"),
        ("Q", "K", "V", "W_{}"),
    )
    for form in forms.split()
)
VALUE_NAMES: tuple[str, ...] = tuple(value for *_, value in QUERY_KEY_VALUE)
_OUT = (
    "out o_proj out_proj output_proj wo w_o to_out c_proj o to_out_0 out_lin attn_out "
    "attention_out o_dense out_dense output_dense out_linear output_linear out_projection "
    "output_projection dense attn_vec_einsum proj output_w proj_final"
)
#: Output projections, whose input features are all the heads' values, in one spelling.
OUT_NAMES: tuple[str, ...] = tuple(_OUT.split())
#: Normalisations of queries and keys, as they are called beside the projections.
NORM_NAMES: tuple[tuple[str, str], ...] = tuple(
    (form.format(query), form.format(key))
    for query, key, forms in (
        ("query", "key", "{}_ln {}_norm {}_layer_norm _{}_norm"),
        ("q", "k", "{}_norm {}_layernorm {}_ln norm_{}"),
    )
    for form in forms.split()
)
_KV = "key value"

#: Tried in this order under every module; the first whose projections are all there is taken.
BUILTIN_LAYOUTS: tuple[AttentionLayout, ...] = (
    # Latent attention of MaxText, and of DeepSeek and Kimi in Hugging Face. The up projection makes
    # keys and values together, or keys alone.
    *(
        _layout(
            "latent (low-rank query)" if query in ("wq_b", "q_b_proj") else "latent",
            f"{query}: query query_alone; {up}: {'key' if up in ('wk_b', 'k_b_proj') else _KV}",
            latent=(down, up),
            interleaved=True,
        )
        for down, ups, queries in (
            ("wkv_a", "wkv_b wk_b", "wq_b query wq"),
            ("kv_a_proj_with_mqa", "kv_b_proj k_b_proj", "q_b_proj q_proj"),
        )
        for up in ups.split()
        for query in queries.split()
    ),
    *(
        _layout(
            "latent (separate parts)", f"q_nope{x}: query; q_rope{x}: query_alone; k_nope{x}: key"
        )
        for x in ("", "_proj")
    ),
    *(separate(query, key) for query, key, _ in QUERY_KEY_VALUE),
    # Gemma's einsums are (heads, inputs, size). The keys of Gemma 4 are the values too, so that
    # only queries can be scaled.
    _layout("separate q, fused k v", f"q_einsum: query; kv_einsum: {_KV}", input_axis=-2),
    _layout(
        "separate q, keys that are values", "q_einsum: query_alone; k_einsum: value", input_axis=-2
    ),
    _layout("fused q k v", f"qkv_einsum: query {_KV}", input_axis=-2),
    # Praxis: (3, inputs, heads, size).
    _layout("fused q k v", f"combined_qkv: query {_KV}", input_axis=-3),
    # GPT-2: Hugging Face Flax keeps (features, inputs), others (inputs, features).
    _layout("fused q k v", f"c_attn: query {_KV}", input_axis=(0, -1)),
    _layout("fused q k v", f"qkv_proj: query {_KV}"),
    _layout("fused q k v", f"qkv: query {_KV}"),
    # BLOOM and GPT-NeoX head by head; Falcon group by group.
    _layout("fused q k v, interleaved", f"query_key_value: query {_KV}", interleaved=True),
    _layout("separate q, fused k v", f"q_proj: query; kv_proj: {_KV}"),
    _layout("separate q, fused k v", f"to_q: query; to_kv: {_KV}"),
    _layout("separate q, fused k v", f"q: query; kv: {_KV}"),
)
