"""A toy Kimi in Flax Linen: latent attention, routed experts beside a shared one, on bytes.

The attention is DeepSeek's (arXiv 2405.04434): queries, keys and values come from narrow latents,
a part of each head's features is rotated, and all heads share one rotated key. The names are those
that QK-Clip and the routing know.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from common.model import BYTES, rotate
from muonclip_jax import dot_product_attention


@dataclass(frozen=True)
class MoEConfig:
    """The sizes of the model, in DeepSeek's proportions; the first layer has no experts."""

    layers: int = 3
    width: int = 96
    heads: int = 4
    query_latent: int = 48
    key_value_latent: int = 32
    plain: int = 16  # features of a query or key that are not rotated
    rotated: int = 8
    value: int = 16
    experts: int = 8
    chosen: int = 2
    expert_hidden: int = 64
    dense_hidden: int = 256


class LatentAttention(nn.Module):
    """Multi-head latent attention, under the names that MaxText gave it."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Attends, and sows `max_logits`, shape `(heads,)`."""
        config, dense = self.config, partial(nn.DenseGeneral, use_bias=False)
        latent = nn.RMSNorm(name="q_norm")(dense(config.query_latent, name="wq_a")(x))
        query = dense((config.heads, config.plain + config.rotated), name="wq_b")(latent)
        down = dense(config.key_value_latent + config.rotated, name="wkv_a")(x)
        latent, shared_key = jnp.split(down, [config.key_value_latent], axis=-1)
        latent = nn.RMSNorm(name="kv_norm")(latent)
        up = dense((config.heads, config.plain + config.value), name="wkv_b")(latent)

        query, query_rotated = jnp.split(query, [config.plain], axis=-1)
        key, value = jnp.split(up, [config.plain], axis=-1)
        shared_key = jnp.broadcast_to(rotate(shared_key[..., None, :]), query_rotated.shape)
        out, max_logits = dot_product_attention(
            jnp.concatenate([query, rotate(query_rotated)], axis=-1),
            jnp.concatenate([key, shared_key], axis=-1),
            value,
            is_causal=True,
        )
        self.sow("intermediates", "max_logits", max_logits)
        return dense(config.width, axis=(-2, -1), name="out")(out)


@jax.custom_vjp
def balanced(weights: Array, bias: Array, excess: Array) -> Array:
    """Returns `weights`, and declares `excess` to be the gradient of `bias`.

    DeepSeek-V3 moves the bias of an expert down where it had more than its share of the tokens, and
    up where it had less, beside the optimizer (arXiv 2408.15664). With the excess for a gradient,
    Adam does the same: its steps have the size of the rate, whatever that of the gradient.
    """
    return weights


balanced.defvjp(
    lambda weights, bias, excess: (weights, excess),
    lambda excess, cotangent: (cotangent, excess, jnp.zeros_like(excess)),
)


class Router(nn.Module):
    """Chooses experts for every token by sigmoid scores; a bias on the choice balances the load."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time experts"]:
        """Returns each expert's weight, zero where it was not chosen; sows `load`, fair at 1."""
        count, chosen = self.config.experts, self.config.chosen
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], count))
        bias = self.param("bias", nn.initializers.zeros, (count,))
        scores = nn.sigmoid(x @ kernel)
        _, best = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), chosen)
        mask = jax.nn.one_hot(best, count).sum(axis=-2)
        load = mask.mean(axis=(0, 1)) * count / chosen
        self.sow("intermediates", "load", load)
        weights = scores * mask
        return balanced(weights / weights.sum(axis=-1, keepdims=True), bias, load - 1)


class Experts(nn.Module):
    """Gated MLPs in stacks `(experts, in, out)`.

    Every expert sees every token here, and the weights pick: at this size that is quickest. At a
    real one tokens are sorted by expert and go through `jax.lax.ragged_dot`, with these kernels.
    """

    config: MoEConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time width"],
        weights: Float[Array, "batch time experts"],
    ) -> Float[Array, "batch time width"]:
        """Returns the weighted sum of what the experts say."""
        width, hidden = x.shape[-1], self.config.expert_hidden

        def kernel(name: str, *shape: int) -> Array:
            init = nn.initializers.lecun_normal(batch_axis=0)
            return self.param(name, init, (self.config.experts, *shape))

        gate = jnp.einsum("btd,edh->bteh", x, kernel("gate", width, hidden))
        up = jnp.einsum("btd,edh->bteh", x, kernel("up", width, hidden))
        inner = nn.silu(gate) * up * weights[..., None]
        return jnp.einsum("bteh,ehd->btd", inner, kernel("down", hidden, width))


class MLP(nn.Module):
    """A gated MLP: the first layer's, and the expert that every token goes through."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Returns what is added to the residual stream."""
        dense = partial(nn.Dense, use_bias=False)
        inner = nn.silu(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="up")(x)
        return dense(x.shape[-1], name="down")(inner)


class MoE(nn.Module):
    """Some experts for each token, chosen by a router, and one for all."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Returns the sum of both."""
        routed = Experts(self.config, name="experts")(x, Router(self.config, name="router")(x))
        return routed + MLP(self.config.expert_hidden, name="shared_expert")(x)


class MoELM(nn.Module):
    """The language model: bytes in, logits of the next byte out."""

    config: MoEConfig

    @nn.compact
    def __call__(self, tokens: UInt8[Array, "batch time"]) -> Float[Array, "batch time bytes"]:
        """Returns next-byte logits for every position."""
        config = self.config
        x = nn.Embed(BYTES, config.width, name="embed")(tokens.astype(jnp.int32))
        for i in range(config.layers):
            attention = LatentAttention(config, name=f"attention_{i}")
            x = x + attention(nn.RMSNorm(name=f"attention_norm_{i}")(x))
            mlp = MoE(config, name=f"moe_{i}") if i else MLP(config.dense_hidden, name="mlp_0")
            x = x + mlp(nn.RMSNorm(name=f"mlp_norm_{i}")(x))
        return nn.Dense(BYTES, use_bias=False, name="head")(nn.RMSNorm(name="final_norm")(x))
