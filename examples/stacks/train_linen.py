"""Flax Linen: Flax's own attention under `nn.scan` and `nn.remat`, and a `TrainState`.

python examples/stacks/train_linen.py [folder for the checkpoint]
"""

import flax.linen as nn
import jax
import optax
from shared import WORDS, batch, check_clip, check_describe, check_losses, check_routing

import muonclip_jax as mc
from muonclip_jax.linen import TrainState, capture_max_logits


class Block(nn.Module):
    """One layer."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x, _):
        """Returns the carry of the scan, and nothing to stack."""
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, mask=mask)
        y = nn.gelu(nn.Dense(2 * self.width, name="up")(nn.RMSNorm()(x)))
        return x + nn.Dense(self.width, name="down")(y), None


class Model(nn.Module):
    """Tokens to logits; the layers are one stacked leaf for each weight."""

    width: int = 32
    heads: int = 4
    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        """Applies the scanned layers."""
        x = nn.Embed(WORDS, self.width, name="embedding")(tokens)
        scanned = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scanned(self.width, self.heads, name="layers")(x, None)
        return nn.Dense(WORDS, use_bias=False, name="head")(x)


def loss_fn(params, tokens):
    """Returns the loss, and the maxima `(layers, heads)` of the attention."""
    apply = capture_max_logits(model.apply)
    logits, max_logits = apply({"params": params}, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), max_logits


model = Model()
tx = mc.muonclip(learning_rate=2e-3, qk_clip_threshold=20.0)
params = model.init(jax.random.key(0), batch(0))["params"]
train_state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def step(train_state, tokens):
    """One step; `TrainState` hands the maxima to the optimizer."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, max_logits), grads = grad_fn(train_state.params, tokens)
    return train_state.apply_gradients(grads=grads, max_logits=max_logits), loss


losses = []
for i in range(60):
    train_state, loss = step(train_state, batch(i))
    losses.append(loss)

params = train_state.params
check_routing(params, muon=r"attention/\w+/kernel$|(up|down)/kernel$")
check_losses(losses)
check_clip(params, lambda params: loss_fn(params, batch(100))[1])
saved = {"step": train_state.step, "params": params, "opt_state": train_state.opt_state}
check_describe("linen", saved, params)
