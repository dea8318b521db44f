"""Trains the byte-level GPT in Flax NNX: `nnx.Optimizer` with MuonClip in it.

    python examples/train_nnx.py

Two lines differ from any other NNX training. The forward pass runs inside `capture_max_logits`,
which returns the largest logit of every attention head beside its output, and
`optimizer.update` gets them as `max_logits=`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import plots, program
from common.model import BYTES, ModelConfig, cross_entropy, rotate
from common.training import Record, Settings, step_record
from flax import nnx

import muonclip_jax as mc
from muonclip_jax.nnx import capture_max_logits, dot_product_attention

Pair = tuple["GPT", "nnx.Optimizer[GPT]"]


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def heads(count: int) -> nnx.LinearGeneral:
            shape = (count, config.head_dim)
            return nnx.LinearGeneral(config.width, shape, use_bias=False, rngs=rngs)

        self.query = heads(config.query_heads)
        self.key = heads(config.key_heads)
        self.value = heads(config.key_heads)
        self.out = nnx.LinearGeneral(
            (config.query_heads, config.head_dim),
            config.width,
            axis=(-2, -1),
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends; `dot_product_attention` is Flax's, and records where it is asked to."""
        query, key = rotate(self.query(x)), rotate(self.key(x))
        return self.out(dot_product_attention(query, key, self.value(x), is_causal=True))


class Block(nnx.Module):
    """One layer: attention, then a gated MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.gate = linear(config.width, config.hidden)
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds both to the residual stream."""
        x = x + self.attention(self.attention_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class GPT(nnx.Module):
    """The language model: bytes in, logits of the next byte out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns next-byte logits for every position."""
        x = self.embed(tokens.astype(jnp.int32))
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def build(settings: Settings) -> Pair:
    """Returns the model and its optimizer."""
    model = GPT(settings.model, nnx.Rngs(settings.seed))
    tx = mc.muonclip(
        settings.schedule(),
        weight_decay=settings.decay,
        qk_clip_threshold=settings.threshold,
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@partial(nnx.jit, static_argnames="settings")
def train_step(
    model: GPT, optimizer: nnx.Optimizer[GPT], tokens: jax.Array, *, settings: Settings
) -> dict[str, jax.Array]:
    """Updates the model in place, and returns the step's scalars."""

    def loss_and_maxima(model: GPT) -> tuple[jax.Array, Any]:
        logits, max_logits = capture_max_logits(model)(tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:]), max_logits

    (loss, max_logits), grads = nnx.value_and_grad(loss_and_maxima, has_aux=True)(model)
    params = nnx.state(model, nnx.Param)
    info = mc.qk_clip_info(params, max_logits, threshold=settings.threshold)
    record = step_record(settings, optimizer.step[...], loss, info)
    optimizer.update(model, grads, max_logits=max_logits)
    return record | {f"{path}/max_logit": heads.max() for path, heads in info.max_logits.items()}


@nnx.jit
def score(model: GPT, tokens: jax.Array) -> jax.Array:
    """Returns the loss on windows."""
    return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def step(pair: Pair, tokens: Any, *, settings: Settings) -> tuple[Pair, dict[str, jax.Array]]:
    """One step as the shared loop calls it."""
    return pair, train_step(*pair, tokens, settings=settings)


def draw(path: Path, records: list[Record], settings: Settings) -> None:
    """Draws the losses, and each layer's largest logit against the threshold."""
    drawn, (left, right) = plots.figure(2)
    plots.draw_loss(left, records, f"{settings.score_on}_loss")
    for layer in range(settings.model.layers):
        name = f"blocks/{layer}/attention/max_logit"
        right.plot(*plots.series(records, name), linewidth=1.2, label=f"layer {layer + 1}")
    plots.draw_threshold(right, settings.threshold)
    right.set_ylim(bottom=0)
    right.set_ylabel("largest attention logit of the step")
    right.legend()
    plots.save(drawn, path)


def main(arguments: list[str] | None = None) -> list[Record]:
    """Trains, and draws the picture."""
    parser = program.parser("train_nnx", __doc__)
    program.add_picture(parser)
    options = parser.parse_args(arguments)
    settings = program.settings_of(options)
    _, records = program.train(
        options,
        settings,
        build(settings),
        step=partial(step, settings=settings),
        score=lambda pair, tokens: score(pair[0], tokens),
    )
    picture = program.picture_of(options)
    draw(picture, records, settings)
    print(f"picture: {picture}")
    return records


if __name__ == "__main__":
    main()
