"""Plain JAX: parameters in dicts, functions, and `mc.dot_product_attention`.

python examples/stacks/train_plain_jax.py [folder for the checkpoint]
"""

import jax
import jax.numpy as jnp
import optax
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing, train

import muonclip_jax as mc

WIDTH, HEADS, SIZE, LAYERS = 32, 4, 8, 2


def init(key):
    """Kernels are `(inputs, outputs)`, with heads on an axis of their own."""

    def normal(*shape, inputs=WIDTH):
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape) / inputs**0.5

    blocks = [
        {
            "attention": {
                "wq": normal(WIDTH, HEADS, SIZE),
                "wk": normal(WIDTH, HEADS, SIZE),
                "wv": normal(WIDTH, HEADS, SIZE),
                "wo": normal(HEADS, SIZE, WIDTH),
            },
            "up": normal(WIDTH, 2 * WIDTH),
            "down": normal(2 * WIDTH, WIDTH, inputs=2 * WIDTH),
        }
        for _ in range(LAYERS)
    ]
    return {"embed": normal(WORDS, WIDTH), "blocks": blocks, "head": normal(WIDTH, WORDS)}


def normalize(x):
    """RMSNorm without a gain."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(params, x):
    """Returns the output and the largest logit of each head."""
    names = ("wq", "wk", "wv")
    query, key, value = (jnp.einsum("btd,dnh->btnh", x, params[k]) for k in names)
    y, max_logits = mc.dot_product_attention(query, key, value, is_causal=True)
    return jnp.einsum("btnh,nhd->btd", y, params["wo"]), max_logits


def apply(params, tokens):
    """Tokens to logits, and maxima nested as the parameters are."""
    x, maxima = params["embed"][tokens], []
    for block in params["blocks"]:
        y, found = attention(block["attention"], normalize(x))
        x = x + y
        x = x + jax.nn.gelu(normalize(x) @ block["up"]) @ block["down"]
        maxima.append({"attention": found})
    return normalize(x) @ params["head"], {"blocks": maxima}


def loss_fn(params, tokens):
    """Returns the loss, and the maxima."""
    logits, max_logits = apply(params, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), max_logits


params = init(jax.random.key(0))
tx = mc.muonclip(learning_rate=2e-3, qk_clip_threshold=20.0)
state = tx.init(params)


@jax.jit
def step(params, state, tokens):
    """One step; the maxima go to the optimizer with the gradients."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, max_logits), grads = grad_fn(params, tokens)
    updates, state = tx.update(grads, state, params, max_logits=max_logits)
    return optax.apply_updates(params, updates), state, loss


params, state, losses = train(step, params, state, 60)

check_routing(params, muon=r"attention/\w+$|up$|down$")
check_losses(losses)
check_clip(params, lambda params: loss_fn(params, batch(100))[1])
check_describe("plain_jax", {"params": params, "opt_state": state}, params)
