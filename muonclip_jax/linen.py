"""Flax Linen: attention that records its largest logits, their capture, and a train state.

A model that uses Flax's own attention modules needs no change at all:

    apply = muonclip_jax.linen.capture_max_logits(model.apply)
    logits, max_logits = apply({"params": params}, tokens)

A model may also record by itself, with `attention_fn=muonclip_jax.linen.dot_product_attention` on
the module, or by calling that function. The maxima are sown into `intermediates` as `max_logits`
at the path of the module whose query and key kernels the clip scales, and come back from
`model.apply(..., mutable=["intermediates"])`.

Either way one call returns the maxima of the pass that was run, with its masks, its dropout and
its decoding cache. Under `nn.scan` and `nn.vmap` they are stacked like the kernels, provided that
`variable_axes` names `intermediates` beside `params`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import errors, struct
from flax.core.scope import CollectionFilter, in_filter, union_filters
from flax.linen.dtypes import promote_dtype
from flax.training import train_state
from jax import lax
from jaxtyping import Array, Float

from muonclip_jax._paths import join
from muonclip_jax._typing import Tree
from muonclip_jax.attention import batched_attention, batched_max_logits, only_max_logits
from muonclip_jax.kernels.pairs import bias_permits

_COLLECTION = "intermediates"
_NAME = "max_logits"

# Whether a capture is under way: what cannot be recorded is an error then.
_capturing: ContextVar[bool] = ContextVar("_capturing", default=False)


class _Probe(nn.Module):
    """An empty module: Linen gives it the module that is being called as its parent."""


def _calling_module() -> nn.Module | None:
    """Returns the module whose method is running, or None outside of any."""
    try:
        parent = _Probe().parent
    except errors.AssignSubModuleError as error:
        raise ValueError(
            "The module that computes this attention cannot be told from a method that is not "
            "@nn.compact. Pass it: dot_product_attention(..., record_in=self)."
        ) from error
    return parent if isinstance(parent, nn.Module) else None


def _record(module: nn.Module | None, max_logits: Float[Array, " N"]) -> None:
    """Sows maxima at the module's own path, where somebody collects them."""
    if module is None or module.scope is None or module.is_initializing():
        return
    if not module.sow(_COLLECTION, _NAME, max_logits) and _capturing.get():
        raise ValueError(
            f"The maxima of {join(module.path)!r} cannot leave the transformation it runs in, for "
            f"that does not carry the collection {_COLLECTION!r}. Name it beside 'params', for "
            "example nn.scan(..., variable_axes={'params': 0, 'intermediates': 0})."
        )


def _dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    precision: Any,
    einsum_dot_general: Callable[..., jax.Array] | None,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None,
    **keywords: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs Flax's own attention, and takes the maxima from the logits that it computes.

    Flax lets the caller supply the product that makes the logits. This one hands them on as Flax
    would have made them, and looks at them in float32 before they are rounded to Flax's dtype.
    """
    plain = functools.partial(
        jnp.einsum, precision=precision, _dot_general=einsum_dot_general or lax.dot_general
    )
    seen: list[jax.Array] = []

    def logits_einsum(subscripts: str, query: jax.Array, key: jax.Array) -> jax.Array:
        if qk_attn_weights_einsum is not None:
            logits = qk_attn_weights_einsum(subscripts, query, key)
        else:
            dtype = jnp.promote_types(query.dtype, jnp.float32)
            logits = plain(subscripts, query, key, preferred_element_type=dtype)
        seen.append(lax.stop_gradient(logits).astype(jnp.float32))
        return logits.astype(query.dtype)

    out = nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        qk_attn_weights_einsum=logits_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum or plain,
        **keywords,
    )
    (logits,) = seen
    if mask is not None:
        logits = jnp.where(jnp.asarray(mask).astype(bool), logits, -jnp.inf)
    if bias is not None:
        logits = jnp.where(bias_permits(lax.stop_gradient(bias)), logits, -jnp.inf)
    heads = logits.ndim - 3
    other_axes = tuple(axis for axis in range(logits.ndim) if axis != heads)
    return out, jnp.max(logits, axis=other_axes, initial=-jnp.inf)


def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., jax.Array] | None = None,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    *,
    implementation: str | None = None,
    record_in: nn.Module | None = None,
) -> Float[Array, "*B T N D"]:
    """Computes Flax's attention and sows the largest logit of every head as `max_logits`.

    The arguments are those of `flax.linen.dot_product_attention`, so that Flax's modules take it
    as `attention_fn`. Without dropout, sown weights and products of the user's own, attention is
    `muonclip_jax.dot_product_attention`: its memory is linear in the sequence, key heads may be
    shared, and logits and softmax are in float32 whatever the dtype. With any of those it is
    Flax's own attention, and the maxima are taken from the logits that it computes.

    Args:
        query: Queries `(*B, T, N, H)`.
        key: Keys `(*B, S, K, H)`.
        value: Values `(*B, S, K, D)`.
        bias: Added to the logits; broadcasts to `(*B, N, T, S)`. It counts in the maxima only
            where it forbids a pair.
        mask: True or not zero where a pair takes part; broadcasts to `(*B, N, T, S)`.
        broadcast_dropout: Whether batch and heads share a dropout mask.
        dropout_rng: Key of the dropout.
        dropout_rate: Share of weights that dropout removes. Maxima do not see dropout.
        deterministic: Whether dropout is off.
        dtype: What query, key and value are cast to.
        precision: Precision of the products.
        module: Given by Flax's modules when the attention weights are to be sown too.
        force_fp32_for_softmax: Whether Flax's own attention computes softmax in float32.
        einsum_dot_general: The `dot_general` of the products.
        qk_attn_weights_einsum: The product that makes the logits.
        attn_weights_value_einsum: The product of weights and values.
        implementation: As in `muonclip_jax.dot_product_attention`. Set it with
            `functools.partial`.
        record_in: The module to record in. The module that is being called by default, which
            Linen tells in `@nn.compact` methods only. Outside of a module nothing is recorded.

    Returns:
        The output `(*B, T, N, D)`.

    Raises:
        ValueError: If the calling module cannot be told, or during a capture if the maxima cannot
            leave a transformation.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.MultiHeadDotProductAttention(2, attention_fn=dot_product_attention)
        >>> x = jnp.ones((1, 3, 8))
        >>> params = model.init(jax.random.key(0), x)
        >>> _, state = model.apply(params, x, mutable=["intermediates"])
        >>> state["intermediates"]["max_logits"][0].shape
        (2,)
    """
    target = record_in or module or _calling_module()
    drops = dropout_rate > 0.0 and not deterministic
    products = (precision, einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    if module is None and not drops and all(product is None for product in products):
        out, max_logits = batched_attention(
            query, key, value, bias, mask, implementation=implementation
        )
    else:
        out, max_logits = _dense_attention(
            query,
            key,
            value,
            bias,
            mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            precision=precision,
            module=module,
            force_fp32_for_softmax=force_fp32_for_softmax,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
    _record(target, max_logits)
    return out


def _records(attention_fn: Callable[..., Any]) -> bool:
    while isinstance(attention_fn, functools.partial):
        attention_fn = attention_fn.func
    return inspect.unwrap(attention_fn) is inspect.unwrap(dot_product_attention) or hasattr(
        attention_fn, "records_max_logits"
    )


def _recording(attention_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an attention function that computes the same and records."""
    if _records(attention_fn):
        return attention_fn
    if attention_fn is nn.dot_product_attention:
        return dot_product_attention

    # The signature stays, for Flax's modules pass only the arguments that they find in it.
    @functools.wraps(attention_fn)
    def record(query, key, value, *arguments, **keywords):
        call = inspect.signature(attention_fn).bind_partial(
            query, key, value, *arguments, **keywords
        )
        given = call.arguments | keywords
        query_, key_ = promote_dtype(query, key, dtype=given.get("dtype"))
        pairs = {name: given.get(name) for name in ("bias", "mask")}
        _record(_calling_module(), batched_max_logits(query_, key_, **pairs))
        return attention_fn(query, key, value, *arguments, **keywords)

    record.__dict__["records_max_logits"] = True
    return record


def _record_flax_attention(
    method: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Lets Flax's attention modules record while one of their calls runs."""
    module = context.module
    if not isinstance(module, nn.MultiHeadDotProductAttention) or context.method_name != "__call__":
        return method(*arguments, **keywords)
    attention_fn = module.attention_fn
    # A bound module is this call's own copy; its field is put back all the same.
    object.__setattr__(module, "attention_fn", _recording(attention_fn))
    try:
        return method(*arguments, **keywords)
    finally:
        object.__setattr__(module, "attention_fn", attention_fn)


@contextmanager
def _capture() -> Iterator[None]:
    token = _capturing.set(True)
    try:
        with nn.intercept_methods(_record_flax_attention):
            yield
    finally:
        _capturing.reset(token)


def capture_max_logits(apply_fn: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Makes `model.apply` return the largest logit of every attention head beside its output.

    The model stays as it is. Flax's attention modules, and those derived from them, record while
    the call runs: with Flax's default `attention_fn` from the very logits that attention computes,
    with another one by computing them once more, block by block. Whatever else is sown as
    `max_logits` is returned too. Pure: it works under `jit`, `value_and_grad`, `nn.remat`,
    `nn.scan` and `nn.vmap`.

    Args:
        apply_fn: `model.apply`, or a function that takes variables first and `mutable=` as it does.

    Returns:
        A function of the same arguments. It returns what `apply_fn` returns, and the tree of
        maxima, which mirrors the paths of the attention modules.

    Raises:
        ValueError: From the returned function: if no attention recorded anything, or if a maximum
            cannot leave a transformation that does not carry `intermediates`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(8), nn.MultiHeadAttention(num_heads=2)])
        >>> x = jnp.ones((1, 3, 8))
        >>> params = model.init(jax.random.key(0), x)
        >>> out, max_logits = capture_max_logits(model.apply)(params, x)
        >>> jax.tree.map(jnp.shape, max_logits)
        {'layers_1': {'max_logits': (2,)}}
    """

    @functools.wraps(apply_fn)
    def captured(
        variables: Tree, *arguments: Any, mutable: CollectionFilter = False, **keywords: Any
    ) -> tuple[Any, dict[str, Any]]:
        # What an earlier call recorded is not this one's.
        variables = {name: tree for name, tree in variables.items() if name != _COLLECTION}
        with _capture():
            out, state = apply_fn(
                variables, *arguments, mutable=union_filters(mutable, [_COLLECTION]), **keywords
            )
        max_logits = only_max_logits(state.get(_COLLECTION, {}))
        if not max_logits:
            raise ValueError(
                "The capture caught no logit. It sees nn.MultiHeadDotProductAttention and modules "
                "derived from it, nn.SelfAttention and nn.MultiHeadAttention among them. In other "
                "attention modules call muonclip_jax.linen.dot_product_attention, or sow maxima "
                f"yourself: self.sow({_COLLECTION!r}, {_NAME!r}, max_logits)."
            )
        if mutable is False:
            return out, max_logits
        if not in_filter(mutable, _COLLECTION):
            state = {name: tree for name, tree in state.items() if name != _COLLECTION}
        return (out, state), max_logits

    return captured


class TrainState(train_state.TrainState):
    """Flax's train state, whose `apply_gradients` forwards what the optimizer asks for.

    Flax's own passes `tx.update` the gradients and parameters alone, so that `max_logits` never
    reaches the clip.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0))
        >>> state = state.apply_gradients(grads=params, max_logits={})
        >>> state.params["kernel"].tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """

    # Flax's fields once more: it declares parameters a FrozenDict, which they need not be.
    step: Any
    apply_fn: Any = struct.field(pytree_node=False)
    params: Any = struct.field(pytree_node=True)
    tx: Any = struct.field(pytree_node=False)
    opt_state: Any = struct.field(pytree_node=True)

    def apply_gradients(self, *, grads: Tree, **kwargs: Any) -> "TrainState":
        """Updates step, parameters and optimizer state.

        Args:
            grads: Gradients, in the tree of the parameters.
            **kwargs: Fields of this dataclass are replaced. Everything else, `max_logits=` above
                all, goes to `tx.update`; a transformation that takes no extra arguments does not
                see it.

        Returns:
            The new train state.
        """
        names = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in names}
        extra = {name: value for name, value in kwargs.items() if name not in names}
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
            return tx.update(updates, state, params, **extra)

        forwarding = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(TrainState, forwarding).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=replaced.get("tx", self.tx))
