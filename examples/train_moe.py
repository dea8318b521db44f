"""Trains a toy Kimi with MuonClip: latent attention and a mixture of experts, on bytes.

    python examples/train_moe.py
    python examples/train_moe.py --steps 1000 --threshold 30

QK-Clip finds the latent attention by its names: the part of a query that meets the key that all
heads share takes the whole factor, the rest is split between query and key. The experts are stacks
of matrices, which Muon orthogonalises one by one; the router is AdamW's. A second run without the
clip shows what the clip does. The model is in `common/moe.py`.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import plots, program
from common.data import load_corpus
from common.moe import MoEConfig, MoELM
from common.training import Record, Settings, Training

import muonclip_jax as mc

SCORE = "held_out_loss"
#: The last steps, whose loads are printed.
LAST = 50


class MoETraining(Training):
    """The training of the other examples, whose records hold the load of every expert too."""

    def observe(self, recorded: Any) -> dict[str, jax.Array]:
        """Returns what the routers recorded, as `load/LAYER/EXPERT`."""
        loads = {
            name: block["router"]["load"][0]
            for name, block in recorded.items()
            if "router" in block
        }
        return {
            f"load/{name}/{expert}": load[expert]
            for name, load in loads.items()
            for expert in range(len(load))
        }


def explain(training: Training) -> str:
    """Returns what Muon trains, and what of the attention the clip would scale."""
    params = jax.eval_shape(training.init).params
    tokens = jnp.zeros((1, training.settings.length), jnp.uint8)
    _, recorded = jax.eval_shape(
        lambda params: training.model.apply({"params": params}, tokens, mutable=["intermediates"]),
        params,
    )
    attention = mc.describe_attention(params, recorded["intermediates"])
    return f"{mc.describe_labels(params)}\n\n{attention}\n"


def loads(records: list[Record]) -> dict[str, list[float]]:
    """Returns the load of every expert by its name, a value for each step."""
    names = [name for name in records[0] if name.startswith("load/")]
    return {name: [record[name] for record in records] for name in names}


def shares(records: list[Record]) -> str:
    """Returns how far the experts' loads were from each other at the end."""
    ends = [statistics.mean(values[-LAST:]) for values in loads(records).values()]
    return (
        f"experts had {min(ends):.2f} to {max(ends):.2f} of a fair share in the last {LAST} steps"
    )


def draw(runs: dict[str, list[Record]], threshold: float, path: Path) -> None:
    """Draws loss, largest logit, and the experts' loads in the run with the clip."""
    drawn, (left, middle, right) = plots.figure(3)
    for name, records in runs.items():
        style: Any = {"color": plots.COLORS[name], "label": plots.NAMES[name], "linewidth": 1.2}
        left.plot(*plots.series(records, SCORE), **style)
        middle.plot(*plots.series(records, "largest_logit"), **style)
    left.set_ylabel("held-out loss, nats per byte")
    plots.draw_threshold(middle, threshold)
    middle.set_ylim(bottom=0)
    middle.set_ylabel("largest attention logit of the step")
    for name, values in loads(runs["muonclip"]).items():
        _, layer, expert = name.split("/")
        color = plots.SEQUENCE[int(layer.rpartition("_")[2]) % len(plots.SEQUENCE)]
        smooth = [statistics.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        label = layer if expert == "0" else None
        right.plot(range(1, len(values) + 1), smooth, color=color, linewidth=0.8, label=label)
    right.axhline(1.0, color="0.3", linestyle="--", linewidth=1, label="fair share")
    right.set_ylim(bottom=0)
    right.set_ylabel("load of each expert, mean of 10 steps")
    for axis in (left, middle, right):
        axis.legend()
    plots.save(drawn, path)


def main() -> None:
    """Trains with the clip and without, prints and draws."""
    parser = program.parser("train_moe", __doc__)
    program.add_picture(parser)
    parser.set_defaults(layers=MoEConfig.layers, width=MoEConfig.width, steps=300)
    options = parser.parse_args()
    # Both runs have what `make comparison` found for MuonClip on the model without experts.
    options.learning_rate = options.learning_rate or Settings().rate
    options.weight_decay = options.weight_decay or Settings().decay
    config = MoEConfig(layers=options.layers, width=options.width)
    if options.smoke:
        options.steps, options.length = min(options.steps, 10), 16
        config = MoEConfig(
            layers=2, width=32, heads=2, experts=4, expert_hidden=16, dense_hidden=32
        )
    corpus = load_corpus(options.data)
    runs = {}
    for name in ("muonclip", "muon"):
        settings = program.settings_of(options, optimizer=name)
        shown = replace(settings.model, layers=config.layers, query_heads=config.heads)
        settings = replace(settings, model=shown)
        training = MoETraining(settings, corpus, MoELM(config))
        if not runs:
            print(explain(training), flush=True)
        _, runs[name] = program.train(
            options,
            settings,
            training.init(),
            step=training.step,
            score=lambda state, tokens, training=training: training.score(state.params, tokens),
            name=name,
        )
        print(shares(runs[name]))
    picture = program.picture_of(options)
    draw(runs, options.threshold, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
