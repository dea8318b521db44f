"""A byte-level GPT in Flax Linen: rotary embeddings, grouped-query attention, RMSNorm, SwiGLU."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from muonclip_jax import dot_product_attention

BYTES = 256


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the model; four query heads share two key heads by default."""

    layers: int = 4
    width: int = 96
    query_heads: int = 4
    key_heads: int = 2
    hidden: int = 256
    attention: str | None = None  # the implementation of `dot_product_attention`
    qk_norm: bool = False  # RMSNorm of queries and keys, in place of a clip

    def __post_init__(self) -> None:
        if self.width % (2 * self.query_heads):
            raise ValueError(
                f"width must be a multiple of {2 * self.query_heads} (rotary embeddings turn pairs "
                f"in each of {self.query_heads} heads), got {self.width}."
            )
        if self.query_heads % self.key_heads:
            raise ValueError(
                f"query_heads must be a multiple of key_heads, got {self.query_heads} and "
                f"{self.key_heads}."
            )

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.width // self.query_heads


def rotate(x: Float[Array, "batch time heads dim"]) -> Float[Array, "batch time heads dim"]:
    """Rotary embeddings (Su et al. 2021, arXiv 2104.09864): turns pairs by growing angles.

    A rotation is linear and keeps lengths, so that a factor on a query or key kernel is a factor on
    its logits: what QK-Clip needs.
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Causal grouped-query attention that records each head's largest logit."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Attends, and sows `max_logits`, shape `(query_heads,)`."""
        config = self.config

        def heads(count: int, name: str) -> Any:
            return nn.DenseGeneral((count, config.head_dim), use_bias=False, name=name)(x)

        query, key = heads(config.query_heads, "query"), heads(config.key_heads, "key")
        if config.qk_norm:
            query, key = nn.RMSNorm(name="query_norm")(query), nn.RMSNorm(name="key_norm")(key)
        query, key, value = rotate(query), rotate(key), heads(config.key_heads, "value")
        out, max_logits = dot_product_attention(
            query, key, value, is_causal=True, implementation=config.attention
        )
        self.sow("intermediates", "max_logits", max_logits)
        return nn.DenseGeneral(config.width, axis=(-2, -1), use_bias=False, name="out")(out)


class Block(nn.Module):
    """One layer: attention, then a gated MLP (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Adds both to the residual stream."""
        config = self.config
        x = x + Attention(config, name="attention")(nn.RMSNorm(name="attention_norm")(x))
        y = nn.RMSNorm(name="mlp_norm")(x)
        gate = nn.Dense(config.hidden, use_bias=False, name="gate")(y)
        up = nn.Dense(config.hidden, use_bias=False, name="up")(y)
        return x + nn.Dense(config.width, use_bias=False, name="down")(nn.silu(gate) * up)


class GPT(nn.Module):
    """The language model: bytes in, logits of the next byte out."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: UInt8[Array, "batch time"] | Int[Array, "batch time"]
    ) -> Float[Array, "batch time bytes"]:
        """Returns next-byte logits for every position."""
        x = nn.Embed(BYTES, self.config.width, name="embed")(tokens.astype(jnp.int32))
        for layer in range(self.config.layers):
            x = Block(self.config, name=f"block_{layer}")(x)
        return nn.Dense(BYTES, use_bias=False, name="head")(nn.RMSNorm(name="final_norm")(x))


def next_byte_loss(
    model: nn.Module, params: Any, tokens: UInt8[Array, "batch length"]
) -> tuple[Float[Array, ""], Any]:
    """Returns the mean cross-entropy in nats per byte, and what the attention recorded."""
    out: Any = model.apply({"params": params}, tokens[:, :-1], mutable=["intermediates"])
    logits, variables = out
    return cross_entropy(jnp.asarray(logits), tokens[:, 1:]), variables["intermediates"]


def cross_entropy(
    logits: Float[Array, "batch time bytes"], targets: UInt8[Array, "batch time"]
) -> Float[Array, ""]:
    """Returns the mean cross-entropy in nats per byte."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = targets.astype(jnp.int32)[..., None]
    return -jnp.take_along_axis(log_probabilities, targets, axis=-1).mean()
