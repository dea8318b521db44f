"""EasyDeL: its Llama, and attention that records the maxima of its heads.

python examples/stacks/train_easydel.py
"""

import easydel as ed
import jax
import jax.numpy as jnp
import optax
from easydel.layers.attention import FlexibleAttentionModule
from flax import nnx
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing, train

import muonclip_jax as mc

attend = FlexibleAttentionModule.forward


def forward(self, query_states, key_states, value_states, *args, **kwargs):
    """Rotary positions are applied, so these are the final queries and keys."""
    maxima = mc.attention_max_logits(query_states, key_states, is_causal=True)
    self.max_logits = nnx.Intermediate(maxima)
    return attend(self, query_states, key_states, value_states, *args, **kwargs)


FlexibleAttentionModule.forward = forward
settings = ed.LlamaConfig(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
model = ed.LlamaForCausalLM(settings, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
graph, params, rest = nnx.split(model, nnx.Param, ...)


def loss_fn(params, tokens):
    """Next-token loss, and the maxima by the paths of the attention modules."""
    model = nnx.merge(graph, params, rest, copy=True)
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    found = nnx.to_flat_state(nnx.pop(model, nnx.Intermediate))
    return loss, {"/".join(map(str, path[:-2])): x.get_value() for path, x in found}


tx = mc.muonclip(learning_rate=5e-3, qk_clip_threshold=20.0)
state = tx.init(params)


@jax.jit
def step(params, state, tokens):
    """One step of training."""
    (loss, max_logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens)
    updates, state = tx.update(grads, state, params, max_logits=max_logits)
    return optax.apply_updates(params, updates), state, loss


with model.mesh:
    params, state, losses = train(step, params, state, 100)

    check_routing(params, muon=r"layers/.*_proj/kernel$")
    check_losses(losses)
    check_clip(params, lambda params: loss_fn(params, batch(0))[1])
saved = {"model": nnx.to_pure_dict(params), "optimizer": state, "step": 100}
check_describe("easydel", saved, params)
