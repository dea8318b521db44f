"""tunix: a Llama of its own models under `PeftTrainer`, which passes no maxima by itself.

python examples/stacks/train_tunix.py [folder for the checkpoint]
"""

import tempfile

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from shared import (
    WORDS,
    batch,
    check_clip,
    check_losses,
    check_routing,
    checkpoint_folder,
    describe,
)
from tunix.models.llama3.model import Attention, Llama3, ModelConfig, apply_rope
from tunix.sft.metrics_logger import MetricsLoggerOptions
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import muonclip_jax as mc
from muonclip_jax.nnx import capture_max_logits, dot_product_attention


class RecordingAttention(Attention):
    """tunix's attention, with its maxima recorded where `capture_max_logits` asks for them."""

    def block(self, x, segment_pos, cache, attn_mask):
        """XLA computes the projections once and drops the first output."""
        query, key = (
            apply_rope(projection(x), segment_pos, head_dim=self.head_dim)
            for projection in (self.q_proj, self.k_proj)
        )
        mask = None if attn_mask is None else attn_mask[:, None]
        dot_product_attention(query, key, key, mask=mask)
        return super().block(x, segment_pos, cache, attn_mask)


class MuonClipTrainer(PeftTrainer):
    """`PeftTrainer` whose step hands the maxima to the optimizer."""

    def create_train_step_fn(self):
        """Returns the step that the trainer compiles."""

        def step(model, optimizer, inputs):
            def loss_fn(model):
                return capture_max_logits(self.loss_fn)(model, **self.gen_model_input_fn(inputs))

            (loss, max_logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
            optimizer.update(model, grads, max_logits=max_logits)
            return loss, None, optax.global_norm(grads)

        return step


def loss_fn(model, tokens):
    """Next-token loss, as tunix calls it."""
    length = tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(length), (len(tokens), length))
    causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (len(tokens), length, length))
    logits, _ = model(tokens[:, :-1], positions, None, causal)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


config = ModelConfig(
    num_layers=2,
    vocab_size=WORDS,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-6,
)
model = Llama3(config, rngs=nnx.Rngs(0))
for layer in model.layers:
    layer.attn.__class__ = RecordingAttention

folder = checkpoint_folder("tunix")
trainer = MuonClipTrainer(
    model,
    mc.muonclip(learning_rate=5e-3, qk_clip_threshold=20.0),
    TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=60,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=60),
        metrics_logging_options=MetricsLoggerOptions(log_dir=tempfile.mkdtemp()),
    ),
).with_loss_fn(loss_fn)
trainer.gen_model_input_fn = lambda tokens: {"tokens": tokens["tokens"]}
first = loss_fn(model, batch(0))
trainer.train([{"tokens": batch(i)} for i in range(60)])
trainer.close()

params = nnx.state(model, nnx.Param)
check_routing(params, muon=r"attn/._proj/w$|mlp/\w+_proj/kernel$")
check_losses([first, loss_fn(model, batch(100))])
graph, rest = nnx.split(model, nnx.Param, ...)[0], nnx.state(model, nnx.Not(nnx.Param))


def maxima_of(params):
    """The maxima that a forward pass with these parameters records."""
    return capture_max_logits(loss_fn)(nnx.merge(graph, params, rest), batch(100))[1]


check_clip(params, jax.jit(maxima_of))
describe("tunix", folder, params)
