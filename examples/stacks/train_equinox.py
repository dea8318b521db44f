"""Equinox: `eqx.nn.MultiheadAttention` with its maxima recorded in `process_heads`.

python examples/stacks/train_equinox.py [folder for the checkpoint]
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing, train

import muonclip_jax as mc


class Block(eqx.Module):
    """Attention with rotary positions, then an MLP."""

    norms: list[eqx.nn.RMSNorm]
    attention: eqx.nn.MultiheadAttention
    rotary: eqx.nn.RotaryPositionalEmbedding
    mlp: eqx.nn.MLP

    def __init__(self, width: int, heads: int, key: jax.Array):
        first, second = jax.random.split(key)
        self.norms = [eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)]
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=first)
        self.rotary = eqx.nn.RotaryPositionalEmbedding(width // heads)
        self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, key=second)

    def __call__(self, x):
        """Returns the output, and the maxima at the path of the attention."""
        maxima = []

        def process_heads(query, key, value):
            query, key = (jax.vmap(self.rotary, 1, 1)(y) for y in (query, key))
            maxima.append(mc.attention_max_logits(query, key, is_causal=True))
            return query, key, value

        y = jax.vmap(self.norms[0])(x)
        causal = jnp.tri(len(x), dtype=bool)
        x = x + self.attention(y, y, y, mask=causal, process_heads=process_heads)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
        return x, {"attention": maxima[0]}


class Model(eqx.Module):
    """Tokens `(length,)` to logits `(length, words)`, and the maxima of all blocks."""

    embedding: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, width: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(WORDS, width, key=keys[0])
        self.blocks = [Block(width, heads, k) for k in keys[1:3]]
        self.head = eqx.nn.Linear(width, WORDS, use_bias=False, key=keys[3])

    def __call__(self, tokens):
        """Maxima are nested as the modules are."""
        x, maxima = jax.vmap(self.embedding)(tokens), []
        for block in self.blocks:
            x, found = block(x)
            maxima.append(found)
        return jax.vmap(self.head)(x), {"blocks": maxima}


def loss_fn(params, static, tokens):
    """Returns the loss, and the maxima with the batch before the heads."""
    model = eqx.combine(params, static)
    logits, max_logits = jax.vmap(model)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), max_logits


model = Model(32, 4, jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
tx = mc.muonclip(learning_rate=2e-3, qk_clip_threshold=20.0)
state = tx.init(params)


@eqx.filter_jit
def step(params, state, tokens):
    """One step; the maxima go to the optimizer beside the gradients."""
    (loss, max_logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, static, tokens)
    updates, state = tx.update(grads, state, params, max_logits=max_logits)
    return optax.apply_updates(params, updates), state, loss


params, state, losses = train(step, params, state, 60)

check_routing(params, muon=r"_proj/weight$|mlp/layers/\d/weight$")
check_losses(losses)
check_clip(params, lambda params: loss_fn(params, static, batch(100))[1])

check_describe("equinox", {"model": params, "opt_state": state}, params)
