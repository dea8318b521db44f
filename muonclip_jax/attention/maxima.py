"""The largest logit of every head, and how the maxima of several passes become one.

QK-Clip asks for one number a head: how large did a logit get, anywhere in the global batch? A
global batch is often seen in pieces, as micro-batches one after another and as shards side by
side, and the pieces' maxima are combined by maximum. Only a piece can go wrong, too: its numbers
may overflow. The clip never acts on a maximum that is not finite, so a plain maximum, under which
one NaN hides every other piece, would switch the clip off just when logits grow. Therefore

    finite maxima come first, the largest of them; where there is none, NaN before +inf before -inf

so that a bad piece neither hides a good one nor vanishes where it is all there is.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._tree import MAX_LOGITS, ScalarLike, Tree, flatten_with_paths
from muonclip_jax.attention import finite_first
from muonclip_jax.attention.arguments import AnyArray, read_arguments
from muonclip_jax.attention.max_logits import max_logits


def attention_max_logits(
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B S K H"],
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    *,
    scale: ScalarLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: AnyArray | None = None,
    key_value_seq_lengths: AnyArray | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Float[Array, " N"]:
    r"""Returns the largest logit of every head over the pairs attended to.

    .. math:: S_h = \max_{b, t, s\ \mathrm{attended}} \mathrm{scale}\; q_{bth} \cdot k_{bsh}

    Arguments have the shapes and the order of `jax.nn.dot_product_attention`. The dot products
    accumulate in float32; they are computed block by block, so that memory grows with `T + S` and
    not with `T S`. No gradient flows. It runs beside any attention that keeps its logits to itself.

    Implementations:
        - "xla", the default: everywhere, in plain operations that any partitioner splits.
        - "mosaic_tpu": on TPUs, a Pallas kernel that keeps the logits in the core. Tests
          compare it with float64 in Pallas's interpreter; it has not been timed on a TPU. Products
          of float32 are what JAX makes of them there by default, from bfloat16;
          `jax.default_matmul_precision` raises that. On many devices each works on its own
          sequences and key heads: inside a `jax.shard_map` over all axes of a mesh, and on meshes
          with Explicit axes. Under Auto axes the partitioner cannot split a kernel; map over the
          axes there.

    Args:
        query: Queries `(B, T, N, H)` or `(T, N, H)`.
        key: Keys `(B, S, K, H)` or `(S, K, H)`; `N` must be a multiple of `K`, and query head `n`
            meets key head `n // (N / K)`.
        bias: Additive bias that broadcasts to `(B, N, T, S)`. It is no part of the recorded logit,
            for scaling query and key cannot change it. It counts where it forbids a pair: at
            `finfo(bias.dtype).min / 2` and below, -inf included, and at -1e9 and below.
        mask: Boolean mask that broadcasts to `(B, N, T, S)`, True where a pair takes part.
        scale: Factor of the dot products, `1 / sqrt(H)` by default.
        is_causal: Whether query `t` sees only keys up to `t`.
        query_seq_lengths: Valid queries of each sequence `(B,)`.
        key_value_seq_lengths: Valid keys of each sequence `(B,)`.
        local_window_size: Query `t` sees keys from `t - left` to `t + right`; one number stands
            for both.
        implementation: A name from the list above, or None.

    Returns:
        The maxima `(N,)` in float32. A query with nothing to attend to counts for nothing; a head
        without any pair has -inf. A NaN logit makes its head's maximum NaN or is left out,
        whichever XLA's maximum does on the platform: output and gradients are NaN then anyway.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or no implementation has that name.
        NotImplementedError: If the named implementation cannot serve the call; says why.

    Example:
        >>> import jax.numpy as jnp
        >>> query = jnp.array([[[1.0]], [[5.0]]])
        >>> key = jnp.array([[[2.0]], [[3.0]]])
        >>> attention_max_logits(query, key).tolist()
        [15.0]
        >>> attention_max_logits(query, key, query_seq_lengths=jnp.array([1])).tolist()
        [3.0]

    References:
        Kimi Team, `Kimi K2 <https://arxiv.org/abs/2507.20534>`_, Algorithm 1, 2025
    """
    arguments = read_arguments(
        query,
        key,
        None,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
    )
    return max_logits(
        arguments.query,
        arguments.key,
        scale=arguments.scale,
        geometry=arguments.geometry,
        arrays=arguments.arrays,
        implementation=implementation,
    ).reshape(-1)


def only_max_logits(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the part of nested intermediates that holds maxima, one array a module.

    Example:
        >>> import jax.numpy as jnp
        >>> sown = {"attention": {"max_logits": (jnp.ones(2),), "weights": (jnp.ones(3),)}}
        >>> {name: list(inner) for name, inner in only_max_logits(sown).items()}
        {'attention': ['max_logits']}
    """
    found: dict[Any, Any] = {}
    for name, child in tree.items():
        if name == MAX_LOGITS and not isinstance(child, Mapping):
            found[name] = merge_max_logits(*child) if isinstance(child, tuple) else child
        elif isinstance(child, Mapping) and (inner := only_max_logits(child)):
            found[name] = inner
    return found


def merge_max_logits(*trees: Tree) -> Tree:
    """Returns the elementwise maximum of several trees of maxima, of micro-batches for example.

    The largest finite maximum counts. A NaN or +inf of one tree does not hide a finite maximum of
    another, for the clip leaves alone every head whose maximum is not finite; where no tree has a
    finite one, NaN comes before +inf before -inf.

    Args:
        *trees: Trees of one structure and equal shapes, as Flax returns them or otherwise.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: If no tree is given, or if their structures or shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> first = {"attention": {"max_logits": jnp.array([3.0, jnp.nan])}}
        >>> second = {"attention": {"max_logits": jnp.array([2.0, 7.0])}}
        >>> merge_max_logits(first, second)["attention"]["max_logits"].tolist()
        [3.0, 7.0]
    """
    if not trees:
        raise ValueError("merge_max_logits() needs at least one tree of maxima, got none.")
    leaves, structure = flatten_with_paths(trees[0])
    merged = [leaf for _, leaf in leaves]
    for number, tree in enumerate(trees[1:], start=2):
        others, other_structure = flatten_with_paths(tree)
        paths, other_paths = [path for path, _ in leaves], [path for path, _ in others]
        if structure != other_structure:
            differing = sorted(set(paths) ^ set(other_paths)) or "the kinds of containers"
            raise ValueError(
                f"The trees of maxima must have one structure; trees 1 and {number} differ in "
                f"{differing}. Capture every micro-batch in the same way."
            )
        for (path, leaf), (_, other) in zip(leaves, others, strict=True):
            if jnp.shape(leaf) != jnp.shape(other):
                raise ValueError(
                    f"The maxima at {path!r} have shape {jnp.shape(leaf)} in tree 1 and "
                    f"{jnp.shape(other)} in tree {number}; maxima of one block have one shape."
                )
        merged = [
            finite_first.maximum(jnp.asarray(leaf), jnp.asarray(other))
            for leaf, (_, other) in zip(merged, others, strict=True)
        ]
    return jax.tree_util.tree_unflatten(structure, merged)


def reduce_max_logits(tree: Tree, axis_name: str | tuple[str, ...]) -> Tree:
    """Returns the maxima over mapped axes, with one collective for the whole tree.

    For use inside `jax.shard_map`, `jax.pmap` or `jax.vmap(axis_name=...)`, where every shard has
    the maxima of its own part of the batch. All leaves travel in one packed `lax.pmax`. What is
    not finite is treated as `merge_max_logits` treats it.

    Args:
        tree: Maxima of this shard, leaves of any shapes.
        axis_name: The mapped axis or axes that divide the batch.

    Returns:
        The same tree, its leaves in their own dtypes, equal on all shards.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> maxima = {"attention": {"max_logits": jnp.array([[1.0, 8.0], [5.0, 2.0]])}}
        >>> reduced = jax.vmap(lambda t: reduce_max_logits(t, "batch"), axis_name="batch")(maxima)
        >>> reduced["attention"]["max_logits"].tolist()
        [[5.0, 8.0], [5.0, 8.0]]
    """
    leaves, structure = jax.tree_util.tree_flatten(tree)
    if not leaves:
        return tree
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    packed = jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in leaves])
    values, rank = jnp.split(
        jax.lax.pmax(jnp.concatenate(finite_first.separate(packed)), axis_name), 2
    )
    reduced = finite_first.join(values, rank)
    parts, start = [], 0
    for leaf in leaves:
        part = reduced[start : start + leaf.size]
        parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree_util.tree_unflatten(structure, parts)
