"""Trains the byte-level GPT in Flax Linen: a `TrainState`, layers under `nn.scan` and `nn.remat`.

    python examples/train_linen_trainstate.py

All layers are one stacked set of kernels, `(layers, in, out)`: Muon takes each as a batch of
matrices, and the maxima come back stacked in the same way, `(layers, heads)`. The picture shows
what that is for: the memory and the size of the program of a forward and backward pass with the
layers in a Python loop, scanned, and scanned and rematerialised.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from common import plots, program
from common.model import BYTES, GPT, Block, ModelConfig, cross_entropy
from common.training import Record, Settings, clip_effect, step_record

import muonclip_jax as mc
from muonclip_jax.linen import TrainState, capture_max_logits


class ScannedGPT(nn.Module):
    """The language model of `common.model`, with its blocks scanned."""

    config: ModelConfig
    remat: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns next-byte logits for every position."""
        config = self.config
        # In a scan nothing can be shared with the forward pass, which is what prevent_cse guards.
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            # What a block sows has to leave the scan as its parameters do.
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=config.layers,
        )
        x = nn.Embed(BYTES, config.width, name="embed")(tokens.astype(jnp.int32))
        x, _ = layers(block(config, name="blocks"), x, None)
        return nn.Dense(BYTES, use_bias=False, name="head")(nn.RMSNorm(name="final_norm")(x))


def build(settings: Settings, model: nn.Module) -> TrainState:
    """Returns the state before the first step."""
    tokens = jnp.zeros((1, settings.length), jnp.uint8)
    tx = mc.muonclip(
        settings.schedule(),
        weight_decay=settings.decay,
        qk_clip_threshold=settings.threshold,
    )
    tx = mc.metrics(tx, qk_clip_threshold=settings.threshold)
    params = model.init(jax.random.key(settings.seed), tokens)["params"]
    state: Any = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def gradients(apply_fn: Any, params: Any, tokens: Any) -> tuple[tuple[jax.Array, Any], Any]:
    """Returns the loss with the maxima of its pass, and the gradients."""

    def loss_and_maxima(params: Any) -> tuple[jax.Array, Any]:
        logits, max_logits = capture_max_logits(apply_fn)({"params": params}, tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:]), max_logits

    return jax.value_and_grad(loss_and_maxima, has_aux=True)(params)


@partial(jax.jit, static_argnames="settings", donate_argnums=0)
def step(
    state: TrainState, tokens: Any, *, settings: Settings
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; `apply_gradients` passes the maxima on to the optimizer."""
    (loss, max_logits), grads = gradients(state.apply_fn, state.params, tokens)
    info = mc.qk_clip_info(state.params, max_logits, threshold=settings.threshold)
    record = step_record(settings, state.step, loss, info)
    state = state.apply_gradients(grads=grads, max_logits=max_logits)
    return state, record | clip_effect(state.opt_state, state.params)


@jax.jit
def score(state: TrainState, tokens: Any) -> jax.Array:
    """Returns the loss on windows."""
    return cross_entropy(state.apply_fn({"params": state.params}, tokens[:, :-1]), tokens[:, 1:])


class Cost(NamedTuple):
    """What the compiler says of one forward and backward pass."""

    layers: int
    megabytes: float
    operations: int


MODELS = {
    "Python loop": GPT,
    "nn.scan": partial(ScannedGPT, remat=False),
    "nn.scan and nn.remat": ScannedGPT,
}


def costs(settings: Settings, depths: Sequence[int]) -> dict[str, list[Cost]]:
    """Compiles a pass of each model at several depths, without running it."""
    tokens = jax.ShapeDtypeStruct((settings.batch_size, settings.length + 1), jnp.uint8)
    found: dict[str, list[Cost]] = {name: [] for name in MODELS}
    for depth in depths:
        for name, model in MODELS.items():
            deep = model(replace(settings.model, layers=depth))
            params = jax.eval_shape(deep.init, jax.random.key(0), tokens)["params"]
            compiled = jax.jit(partial(gradients, deep.apply)).lower(params, tokens).compile()
            memory: Any = compiled.memory_analysis()
            operations = (compiled.as_text() or "").count(" = ")
            found[name].append(Cost(depth, memory.temp_size_in_bytes / 1e6, operations))
    return found


def draw(path: Path, records: list[Record], found: dict[str, list[Cost]], score: str) -> None:
    """Draws the losses, and memory and program size by the number of layers."""
    drawn, (left, middle, right) = plots.figure(3)
    plots.draw_loss(left, records, score)
    for name, measured in found.items():
        layers, megabytes, operations = zip(*measured, strict=True)
        middle.plot(layers, megabytes, marker="o", label=name)
        right.plot(layers, operations, marker="o", label=name)
    middle.set_ylabel("MB of intermediate results")
    right.set_ylabel("operations in the compiled program")
    for axis in (middle, right):
        axis.set(xlabel="layers", ylim=(0, None))
        axis.legend()
    plots.save(drawn, path)


def main(arguments: list[str] | None = None) -> list[Record]:
    """Trains, compares the ways to stack layers, and draws the picture."""
    parser = program.parser("train_linen_trainstate", __doc__)
    program.add_picture(parser)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=(2, 4, 8), help="layers to compare at"
    )
    options = parser.parse_args(arguments)
    settings = program.settings_of(options)
    state = build(settings, ScannedGPT(settings.model))
    _, records = program.train(
        options, settings, state, step=partial(step, settings=settings), score=score
    )
    found = costs(settings, [settings.model.layers] if options.smoke else options.depths)
    print("| | layers | MB of intermediate results | operations |\n|---|---|---|---|")
    for name, measured in found.items():
        for cost in measured:
            print(f"| {name} | {cost.layers} | {cost.megabytes:.1f} | {cost.operations} |")
    picture = program.picture_of(options)
    draw(picture, records, found, f"{settings.score_on}_loss")
    print(f"picture: {picture}")
    return records


if __name__ == "__main__":
    main()
