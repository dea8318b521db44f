"""Trains a convolutional net on small handwritten digits: steps to an accuracy, by optimizer.

    python examples/train_convnet.py                  at the rates that --sweep found
    python examples/train_convnet.py --sweep          finds each optimizer's best rate first

Every convolution but the first is under Muon, as in Keller Jordan's CIFAR-10 speed-run; AdamW
trains the first one, the norms, the biases and the output layer. It is compared with AdamW and
with SGD with Nesterov momentum. All report the step at which the accuracy on held-out digits first
reaches the target, over three seeds. Rates are found on other digits and with other seeds.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from common import plots
from common.digits import Digits, digits_batch, load_parts
from common.records import describe, machine
from common.training import Record, State
from jaxtyping import Array, Float

import muonclip_jax as mc

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "train_convnet.json"

SEEDS, SWEEP_SEEDS, SCORE_EVERY = (0, 1, 2), (100, 101), 2
#: Where the search for a rate gives up: an optimizer that reaches nothing has no best one.
MOST_RATES = 8


def rate(k: int) -> float:
    """Returns the k-th rate of the grid that all optimizers share."""
    return round(0.001 * 2**k, 6)


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; hashable, so that a compiled step can depend on it."""

    target: float = 0.97
    steps: int = 60
    batch_size: int = 256
    width: int = 32


class ConvNet(nn.Module):
    """Four convolutions with a norm each, two of them in front of a pooling, and a linear layer."""

    width: int

    @nn.compact
    def __call__(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch 10"]:
        """Returns the logits of the ten digits."""
        x = nn.Conv(self.width, (3, 3), name="first_conv")(images)
        for layer, channels in enumerate((self.width, 2 * self.width, 2 * self.width)):
            x = nn.gelu(nn.GroupNorm(num_groups=8, name=f"norm_{layer}")(x))
            x = nn.Conv(channels, (3, 3), use_bias=False, name=f"conv_{layer}")(x)
            if layer < 2:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.gelu(nn.GroupNorm(num_groups=8, name="last_norm")(x))
        return nn.Dense(10, name="head")(x.max(axis=(1, 2)))


#: The first convolution sees pixels, not features: AdamW trains it.
RULES = mc.MatrixRules([("first_conv/kernel$", None)])

kernels = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)


def muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon and AdamW at one rate, for Muon's updates have the size of AdamW's.

    The momentum is the speed-run's: a run of 60 steps has no use for an average over 20.
    """
    return mc.muonclip(schedule, beta=0.6, weight_decay=0.1, rules=RULES, qk_clip_threshold=None)


def adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with the same decay; norms and biases do not decay."""
    return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=kernels)


def sgd(schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and the decay that is usual for it."""
    return optax.chain(
        optax.add_decayed_weights(5e-4, kernels), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )


#: How to build an optimizer, and the rates 0.001 * 2 ** k to try first.
OPTIMIZERS = {"muon": (muon, (3, 4, 5)), "adamw": (adamw, (2, 3, 4)), "sgd": (sgd, (4, 5, 6))}


def transformation(name: str, peak: Any, settings: Settings) -> optax.GradientTransformation:
    """Returns an optimizer whose rate falls from its peak to zero on a line; it may be traced."""
    return OPTIMIZERS[name][0](optax.linear_schedule(peak, 0.0, settings.steps))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    name: str, settings: Settings, state: State, peak: jax.Array, images: Any, labels: Any
) -> tuple[State, jax.Array]:
    """One update; the peak rate is an argument, for an optimizer to be compiled once for all."""

    def loss_fn(params: Any) -> jax.Array:
        logits: Any = ConvNet(settings.width).apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    tx = transformation(name, peak, settings)
    updates, optimizer = tx.update(gradients, state.optimizer, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), optimizer), loss


@partial(jax.jit, static_argnums=0)
def accuracy(settings: Settings, params: Any, images: Any, labels: Any) -> jax.Array:
    """Returns the share of images whose digit has the largest logit."""
    logits: Any = ConvNet(settings.width).apply({"params": params}, images)
    return (logits.argmax(axis=-1) == labels).mean()


@partial(jax.jit, static_argnums=(0, 1))
def init(name: str, settings: Settings, seed: jax.Array) -> State:
    """Returns the state before the first step."""
    params = ConvNet(settings.width).init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
    return State(jnp.int32(0), params, transformation(name, 0.0, settings).init(params))


def train(
    name: str, peak: float, seed: int, settings: Settings, digits: Digits, scored: Digits
) -> list[Record]:
    """Trains once, and returns loss and accuracy of every step that is scored."""
    state, pending = init(name, settings, jnp.uint32(seed)), []
    for step in range(settings.steps):
        batch = digits_batch(digits, seed=seed, step=step, batch_size=settings.batch_size)
        state, loss = train_step(
            name, settings, state, jnp.float32(peak), batch.images, batch.labels
        )
        if (step + 1) % SCORE_EVERY == 0:
            reached = accuracy(settings, state.params, scored.images, scored.labels)
            pending.append({"step": step + 1, "train_loss": loss, "accuracy": reached})
    return [{key: float(value) for key, value in one.items()} for one in jax.device_get(pending)]


def steps_to_target(records: Iterable[Record], target: float) -> float:
    """Returns the first scored step at which the target is reached, or infinity."""
    return next((one["step"] for one in records if one["accuracy"] >= target), float("inf"))


def next_k(losses: dict[int, float]) -> int | None:
    """Returns where to grow the grid, or None where the best has neighbours on both sides.

    Example:
        >>> next_k({1: 2.0, 2: 1.5, 3: 1.6}), next_k({1: 2.0, 2: 1.5})
        (None, 3)
    """
    best = min(losses, key=losses.__getitem__)
    if best == min(losses):
        return best - 1
    return best + 1 if best == max(losses) else None


def sweep(name: str, settings: Settings, digits: Digits, scored: Digits) -> dict[str, Any]:
    """Finds the rate, among octaves, that needs the fewest steps; worse ones are on both sides."""
    steps: dict[int, float] = {}
    wanted = set(OPTIMIZERS[name][1])
    while wanted:
        for k in sorted(wanted):
            runs = [train(name, rate(k), seed, settings, digits, scored) for seed in SWEEP_SEEDS]
            reached = [steps_to_target(records, settings.target) for records in runs]
            # A run that never gets there counts as one that would with the next score.
            steps[k] = statistics.mean(min(step, settings.steps + SCORE_EVERY) for step in reached)
            print(f"{name}, rate {rate(k):g}: {steps[k]:g} steps on validation digits", flush=True)
        grown = next_k(steps)
        wanted = set() if grown is None or len(steps) >= MOST_RATES else {grown}
    return {
        "best_rate": rate(min(steps, key=steps.__getitem__)),
        "rates": [rate(k) for k in sorted(steps)],
        "steps": [steps[k] for k in sorted(steps)],
    }


def table(runs: dict[str, list[list[Record]]], rates: dict[str, float], target: float) -> str:
    """Returns each seed's steps to the target and last accuracy, as a Markdown table."""
    lines = [f"| | rate | steps to {target:.0%} | mean | accuracy at the end |", "|---" * 5 + "|"]
    for name, seeded in runs.items():
        steps = [steps_to_target(records, target) for records in seeded]
        shown = ", ".join("never" if step == float("inf") else f"{step:.0f}" for step in steps)
        ends = ", ".join(f"{records[-1]['accuracy']:.1%}" for records in seeded)
        mean = "-" if "never" in shown else f"{statistics.mean(steps):.0f}"
        lines.append(f"| {plots.NAMES[name]} | {rates[name]:g} | {shown} | {mean} | {ends} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[list[Record]]], target: float, path: Path) -> None:
    """Draws the wrong digits by step, a line a seed, and a dot where the target is reached."""
    drawn, axis = plots.figure()
    for name, seeded in runs.items():
        for seed, records in enumerate(seeded):
            style: Any = {"color": plots.COLORS[name], "linewidth": 1, "alpha": 0.7}
            steps, accuracies = plots.series(records, "accuracy")
            label = plots.NAMES[name] if seed == 0 else None
            axis.plot(steps, [100 * (1 - value) for value in accuracies], label=label, **style)
            axis.plot(steps_to_target(records, target), 100 * (1 - target), "o", zorder=3, **style)
    axis.axhline(100 * (1 - target), color="0.3", linestyle="--", linewidth=1, label="target")
    axis.set_yscale("log")
    axis.set_ylabel("held-out digits that are wrong, %")
    axis.legend()
    plots.save(drawn, path)


def main() -> None:
    """Finds rates where asked, trains every optimizer with every seed, draws and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    add("--sweep", action="store_true", help="find the rates and write --result")
    add("--result", type=Path, default=RESULT, help="rates and numbers of a --sweep")
    add("--picture", type=Path, default=Path("runs/train_convnet.png"), help="the PNG to draw")
    add("--smoke", action="store_true", help="a few steps of a narrow net, with one seed")
    options = parser.parse_args()
    settings, seeds = Settings(), SEEDS
    if options.smoke:
        settings, seeds = Settings(target=0.2, steps=6, width=8), SEEDS[:1]

    parts = load_parts()
    print(mc.describe_labels(init("muon", settings, jnp.uint32(0)).params, RULES), flush=True)
    names, choosing = options.optimizers, (settings, parts["train"], parts["validation"])
    if options.sweep:
        found = {name: sweep(name, *choosing) for name in names}
    else:
        found = json.loads(options.result.read_text())["optimizers"]
    rates = {name: found[name]["best_rate"] for name in names}
    runs = {
        name: [
            train(name, rates[name], seed, settings, parts["train"], parts["held_out"])
            for seed in seeds
        ]
        for name in names
    }
    draw(runs, settings.target, options.picture)
    text = table(runs, rates, settings.target)
    print(f"{text}\n\npicture: {options.picture}")
    if options.sweep:
        content = {"settings": describe(settings), "seeds": seeds, **machine()}
        content |= {"optimizers": found, "table": text.splitlines()}
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
