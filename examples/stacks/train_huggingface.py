"""Hugging Face Flax (Transformers 4): GPT-2, and attention that records the maxima of its heads.

python examples/stacks/train_huggingface.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing, train
from transformers import FlaxGPT2LMHeadModel, GPT2Config
from transformers.models.gpt2 import modeling_flax_gpt2 as gpt2

import muonclip_jax as mc
import muonclip_jax.linen

attention_modules = []


def remember_module(call, args, kwargs, context):
    """Keeps the attention module that runs, for `attention_weights`."""
    if not isinstance(context.module, gpt2.FlaxGPT2Attention):
        return call(*args, **kwargs)
    attention_modules.append(context.module)
    try:
        return call(*args, **kwargs)
    finally:
        attention_modules.pop()


def attention_weights(query, key, bias=None, **settings):
    """Flax's function, which gets the model's final queries and keys."""
    if attention_modules:
        maxima = mc.attention_max_logits(query, key, bias)
        attention_modules[-1].sow("intermediates", "max_logits", maxima)
    return nn.dot_product_attention_weights(query, key, bias, **settings)


gpt2.dot_product_attention_weights = attention_weights
settings = GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=32, n_layer=2, n_head=4)
model = FlaxGPT2LMHeadModel(settings, input_shape=(1, 12))
params = model.params


def loss_fn(params, tokens):
    """Next-token loss, and the maxima by the paths of the attention modules."""
    inputs = tokens[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    with nn.intercept_methods(remember_module):
        apply = mc.linen.capture_max_logits(model.module.apply)
        outputs, max_logits = apply({"params": params}, inputs, jnp.ones_like(inputs), positions)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, tokens[:, 1:])
    return losses.mean(), max_logits


tx = mc.muonclip(learning_rate=5e-3, qk_clip_threshold=20.0)
state = tx.init(params)


@jax.jit
def step(params, state, tokens):
    """One step of training."""
    (loss, max_logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens)
    updates, state = tx.update(grads, state, params, max_logits=max_logits)
    return optax.apply_updates(params, updates), state, loss


params, state, losses = train(step, params, state, 100)

check_routing(params, muon=r"h/.*/kernel$")
check_losses(losses)
check_clip(params, lambda params: loss_fn(params, batch(0))[1])
check_describe("huggingface", {"params": params, "opt_state": state, "step": 100}, params)
