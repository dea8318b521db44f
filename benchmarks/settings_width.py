"""Sweeps the learning rate over the width of a small transformer, under two scale rules.

    python benchmarks/settings_width.py

One layer of the examples' model, head size 16, at widths 64, 128, 256 and 512; short runs. Only
Muon's rate is swept. AdamW trains embedding, head and norms at one rate for all widths, and nothing
decays. The rules are `consistent_rms=None`, the width rule, and `consistent_rms=0.2`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc
from benchmarks.harness import parser
from benchmarks.settings_runs import Task, compiled, load_corpus, measure, number

RULES = (None, 0.2)
WIDTHS = (64, 128, 256, 512)
#: Octaves of the rate around 0.04; the widest model has fewer, for its runs take longest.
OCTAVES = {64: range(-3, 5), 128: range(-3, 5), 256: range(-2, 4), 512: range(-2, 2)}
CENTRE = 0.04
ADAM_RATE = 0.004
STEPS = 60


def optimizer(
    task: Task, rule: float | None, rate: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Muon at `rate`, AdamW at its own, both on the task's schedule."""
    muon = optax.chain(
        mc.scale_by_muon("keller_jordan"),
        mc.scale_by_shape(consistent_rms=rule),
        optax.scale_by_learning_rate(lambda count: rate * task.shape(count)),
    )
    adam = optax.adam(lambda count: ADAM_RATE * task.shape(count), b2=0.95)
    return optax.with_extra_args_support(
        optax.multi_transform({"muon": muon, "adamw": adam}, mc.label_params)
    )


@functools.lru_cache(maxsize=1)
def program(task: Task, rule: float | None) -> Any:
    """Returns the compiled run of a task; one is kept at a time."""
    return compiled(task, functools.partial(optimizer, task, rule))


def cases(octaves: dict[int, range]) -> Iterator[dict[str, Any]]:
    """Every run, the cheap ones first; both rules move a square matrix by as much."""
    for width, ks in octaves.items():
        for rule in RULES:
            factor = 1 if rule is None else rule * width**0.5
            for k in ks:
                rate = round(CENTRE * 2.0**k / factor, 8)
                yield {"width": width, "consistent_rms": rule, "rate": rate, "seed": 0}


def main() -> None:
    """Sweeps and stores."""
    options = parser(__doc__, "settings_width").parse_args()
    octaves, steps = ({32: range(-1, 2)}, 4) if options.smoke else (OCTAVES, STEPS)
    tasks = {width: Task(width, layers=1, steps=steps) for width in octaves}
    corpus = load_corpus()

    def run(case: Any) -> dict[str, Any]:
        task, seed = tasks[case["width"]], case["seed"]
        final, losses, _, _ = program(task, case["consistent_rms"])(
            seed,
            task.batches(corpus, seed),
            task.scored(corpus),
            jnp.asarray(case["rate"], jnp.float32),
        )
        last = jnp.mean(losses[-max(1, steps // 10) :])
        return {"validation_loss": number(final), "training_loss": number(last)}

    measure("settings_width", options, tasks.values(), cases(octaves), run)


if __name__ == "__main__":
    main()
