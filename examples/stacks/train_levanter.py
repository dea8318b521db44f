"""Levanter: an `OptimizerConfig` registered by name, and a Llama that records its maxima.

python examples/stacks/train_levanter.py [folder for the checkpoint]
"""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jmp
import optax
from levanter.layers.attention import AttentionMask
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel, LlamaTransformer
from levanter.models.lm_model import LmExample
from levanter.optim.config import OptimizerConfig
from levanter.tracker.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing

import muonclip_jax as mc

ATTENTION = "transformer/layers/stacked/self_attn"
RECORDED: dict[str, jax.Array] = {}  # what the forward pass that was traced last recorded


class RecordingTransformer(LlamaTransformer):
    """Levanter's, scanned so that every layer returns the maxima of its heads too."""

    def __call__(self, x, attn_mask, *, key=None, pos_ids=None):
        """Leaves the maxima `(layers, heads)` in `RECORDED`."""

        def layer(block, x):
            q, k, _ = block.self_attn._compute_qkv(block.input_layernorm(x), key=None)
            q = q.flatten_axes(("kv_head", "q_heads_per_group"), "heads")
            q = q.rearrange(("batch", "position", "heads", "head_size")).array
            k = k.rearrange(("batch", "position", "kv_head", "head_size")).array
            maxima = mc.attention_max_logits(q, k, is_causal=True)
            return block(x, attn_mask, pos_ids=pos_ids), hax.named(maxima, "heads")

        x, maxima = self.layers.scan_via(layer)(x)
        RECORDED[ATTENTION] = maxima.array
        return self.norm(x)


@OptimizerConfig.register_subclass("muonclip")
@dataclasses.dataclass(frozen=True)
class MuonClipConfig(OptimizerConfig):
    """`optimizer: {type: muonclip, threshold: 100}` in Levanter's YAML."""

    threshold: float = 100.0

    def build(self, num_train_steps):
        """Returns the optimizer; `obj_fn` is the loss of the step's batch."""
        tx = mc.muonclip(
            self.lr_scheduler(num_train_steps),
            weight_decay=self.weight_decay,
            qk_clip_threshold=self.threshold,
        )

        def update(grads, state, params, *, obj_fn, **_):
            # XLA computes what the two forward passes of a step share once.
            obj_fn(params)
            return tx.update(grads, state, params, max_logits=dict(RECORDED))

        return optax.GradientTransformationExtraArgs(tx.init, update)


def loss_fn(model, example, *, key=None):
    """The pair that Levanter's `obj_fn` expects."""
    loss = model.compute_next_token_loss(example, key=key)
    return loss if isinstance(loss, hax.NamedArray) else hax.named(loss, ()), {}


def example(i):
    """A batch as Levanter's loaders give it."""
    tokens = hax.named(batch(i), ("batch", "position"))
    weights = hax.ones(tokens.axes).at["position", -1].set(0.0)
    return LmExample(tokens, weights, AttentionMask.causal())


config = LlamaConfig(
    max_seq_len=12, hidden_dim=32, intermediate_dim=64, num_layers=2, num_heads=4, num_kv_heads=2
)
model = LlamaLMHeadModel.init(hax.Axis("vocab", WORDS), config, key=jax.random.key(0))
old = model.transformer
recording = RecordingTransformer(old.config, old.layers, old.norm)
model = eqx.tree_at(lambda model: model.transformer, model, recording)

optimizer = MuonClipConfig(learning_rate=1e-2, warmup=0, threshold=20.0).build(60)
settings = TrainerConfig(
    id="muonclip",
    num_train_steps=60,
    train_batch_size=8,
    tracker=NoopConfig(),
    mp=jmp.get_policy("f32"),
    require_accelerator=False,
    load_checkpoint=False,
)
with Trainer(settings, optimizer, loss_fn, add_default_hooks=False) as trainer:
    state = trainer.initial_state(jax.random.key(1), model=model)
    losses = []
    for i in range(60):
        info = trainer.train_step(state, example(i))
        state, losses = info.state, [*losses, info.loss]

    params = eqx.filter(state.model, eqx.is_inexact_array)
    static = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)

    @jax.jit
    def maxima_of(params):
        """The maxima that a forward pass with these parameters records."""
        loss_fn(eqx.combine(params, static), example(100))
        return dict(RECORDED)

    check_routing(params, muon=r"(_proj)/weight")
    check_losses(losses)
    check_clip(params, maxima_of)
check_describe("levanter", {"model": params, "opt_state": state.opt_state}, params)
