"""Haiku: an attention module that leaves its maxima in Haiku's state.

python examples/stacks/train_haiku.py [folder for the checkpoint]
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing, train

import muonclip_jax as mc


class Attention(hk.Module):
    """`hk.MultiHeadAttention` with the same names and shapes, and its maxima as state."""

    def __init__(self, num_heads: int, key_size: int, name: str | None = None):
        super().__init__(name)
        self.num_heads, self.key_size = num_heads, key_size

    def __call__(self, x):
        """`(batch, tokens, width)` to the same shape."""

        def heads(name):
            y = hk.Linear(self.num_heads * self.key_size, name=name)(x)
            return y.reshape(*x.shape[:2], self.num_heads, self.key_size)

        query, key, value = heads("query"), heads("key"), heads("value")
        y, max_logits = mc.dot_product_attention(query, key, value, is_causal=True)
        hk.set_state("max_logits", max_logits)
        return hk.Linear(x.shape[-1], name="linear")(y.reshape(*x.shape[:2], -1))


def forward(tokens):
    """The language model."""
    width, heads = 32, 4
    x = hk.Embed(WORDS, width, name="embedding")(tokens)
    for i in range(2):
        y = hk.RMSNorm(-1, name=f"norm_{i}")(x)
        x = x + Attention(heads, width // heads, name=f"attention_{i}")(y)
        x = x + hk.nets.MLP([2 * width, width], name=f"mlp_{i}")(hk.LayerNorm(-1, True, True)(x))
    return hk.Linear(WORDS, with_bias=False, name="head")(x)


model = hk.without_apply_rng(hk.transform_with_state(forward))


def loss_fn(params, tokens):
    """Returns the loss, and Haiku's state, {"attention_0": {"max_logits": (heads,)}, ...}."""
    logits, max_logits = model.apply(params, maxima, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), max_logits


params, maxima = model.init(jax.random.key(0), batch(0))
tx = mc.muonclip(learning_rate=2e-3, qk_clip_threshold=20.0)
state = tx.init(params)


@jax.jit
def step(params, state, tokens):
    """One step; the maxima go to the optimizer beside the gradients."""
    (loss, max_logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens)
    updates, state = tx.update(grads, state, params, max_logits=max_logits)
    return optax.apply_updates(params, updates), state, loss


params, state, losses = train(step, params, state, 60)

check_routing(params, muon=r"attention_\d/\w+/w$|linear_\d/w$")
check_losses(losses)
check_clip(params, lambda params: loss_fn(params, batch(100))[1])
check_describe("haiku", {"params": params, "opt_state": state, "step": jnp.int32(60)}, params)
