"""Sweeps the learning rate over the width of a small transformer, under each rule of scale.

    python benchmarks/settings_width.py          again until it is finished; a minute to 8 a time

One layer of the examples' model, head size 16, at widths 64, 128, 256 and 512; short runs. Only
Muon's rate is swept. AdamW trains embedding, head and norms at one rate for all widths, and nothing
decays.

**Six rules, three kinds of runs.** All matrices of this model are `w x w`, `w x 2w` or `2w x w`,
and at one width a constant factor of a rule is a factor of the rate. `sqrt(max(fan_in, fan_out))`
is `sqrt(w)` times `sqrt_aspect` for these shapes, so `sqrt_max_fan`, `match_rms_adamw` and
`gad_cell` at rate `r` make the runs that `sqrt_aspect` makes at `r` times their factor of a
`w x w` matrix (`--smoke` checks it). Rates below are those times that factor: what a square matrix
moves by in spectral norm.
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
from muonclip_jax.matrices.scales import SHAPE_RULES

#: The rules that make different runs here.
RULES = ("width_transfer", "sqrt_aspect", "rms_to_rms")
WIDTHS = (64, 128, 256, 512)
#: Octaves of the rate around 0.04; the widest model has fewer, for its runs take longest.
OCTAVES = {64: range(-3, 5), 128: range(-3, 5), 256: range(-2, 4), 512: range(-2, 2)}
CENTRE = 0.04
ADAM_RATE = 0.004
STEPS = 60


def scale_by_rule(index: jax.Array) -> optax.GradientTransformation:
    """`scale_by_shape` with the rule of a traced index, so that one program serves all rules."""
    rules = [mc.scale_by_shape(rule=rule) for rule in SHAPE_RULES]
    branches = [lambda u, tx=tx: tx.update(u, optax.EmptyState())[0] for tx in rules]
    return optax.stateless(lambda updates, _: jax.lax.switch(index, branches, updates))


def optimizer(
    task: Task, rule: jax.Array, rate: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Muon at `rate`, AdamW at its own, both on the task's schedule."""
    muon = optax.chain(
        mc.scale_by_muon("keller_jordan"),
        scale_by_rule(rule),
        optax.scale_by_learning_rate(lambda count: rate * task.shape(count)),
    )
    adam = optax.adam(lambda count: ADAM_RATE * task.shape(count), b2=0.95)
    return optax.with_extra_args_support(
        optax.multi_transform({"muon": muon, "adamw": adam}, mc.label_params)
    )


class Runs:
    """Runs of every width, each with its program compiled once."""

    def __init__(self, tasks: dict[int, Task]):
        self.tasks = tasks
        self.corpus = load_corpus()

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one program at a time is kept)
    def program(self, width: int) -> Any:
        """Returns the compiled run of a width."""
        task = self.tasks[width]
        return compiled(task, functools.partial(optimizer, task))

    def loss(self, width: int, rule: str, rate: float, seed: int = 0) -> tuple[float, float]:
        """Returns the loss on validation text, and the mean of the last tenth of the training."""
        task = self.tasks[width]
        index = list(SHAPE_RULES).index(rule)
        final, losses, _, _ = self.program(width)(
            seed,
            task.batches(self.corpus, seed),
            task.scored(self.corpus),
            jnp.asarray(index),
            jnp.asarray(rate, jnp.float32),
        )
        return float(final), float(jnp.mean(losses[-max(1, task.steps // 10) :]))


def cases(octaves: dict[int, range]) -> Iterator[dict[str, Any]]:
    """Every run, the cheap ones first."""
    for width, ks in octaves.items():
        for rule in RULES:
            for k in ks:
                yield {"width": width, "rule": rule, "rate": round(CENTRE * 2.0**k, 6), "seed": 0}


def check_rules(runs: Runs, width: int) -> None:
    """Raises unless a rule's run is the one of `sqrt_aspect` at the rate that the page says."""
    expected = runs.loss(width, "sqrt_aspect", CENTRE)[0]
    for name in ("sqrt_max_fan", "match_rms_adamw", "gad_cell"):
        found = runs.loss(width, name, CENTRE / SHAPE_RULES[name][0](width, width))[0]
        if abs(found - expected) > 1e-3:
            raise AssertionError(f"{name} gives {found}, sqrt_aspect {expected}.")


def main() -> None:
    """Sweeps and stores."""
    command = parser(__doc__, "settings_width")
    command.add_argument("--minutes", type=float, default=7.0, help="start no run after these")
    options = command.parse_args()
    octaves, steps, layers = OCTAVES, STEPS, 1
    if options.smoke:
        octaves, steps = {32: range(-1, 2)}, 4
    tasks = {width: Task(width, layers, steps) for width in octaves}
    runs = Runs(tasks)
    if options.smoke:
        check_rules(runs, 32)

    def run(case: Any) -> dict[str, Any]:
        final, last = runs.loss(**case)
        return {"validation_loss": number(final), "training_loss": number(last)}

    measure("settings_width", options, tasks.values(), cases(octaves), run)


if __name__ == "__main__":
    main()
