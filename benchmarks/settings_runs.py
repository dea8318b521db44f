"""What both sweeps of docs/settings.md share: a small model, its text, and a whole run as one scan.

A run is a pure function of its settings and seed. All steps are one `lax.scan`, and rates,
thresholds and exponents are traced, so that one compiled program serves every run of a model.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common.data import Corpus, load_corpus as load_corpus, scoring_batch, training_batch
from common.model import GPT, ModelConfig, next_byte_loss

from benchmarks.harness import store

#: Features of a head at every width.
HEAD_DIM = 16


@dataclass(frozen=True)
class Task:
    """The model, the text and the length of a run."""

    width: int
    layers: int
    steps: int
    batch_size: int = 8
    length: int = 64
    warmup: int = 10
    score_windows: int = 64

    @property
    def model(self) -> GPT:
        """A GPT whose matrices are all `w x w`, `w x 2 w` and `2 w x w`."""
        heads = self.width // HEAD_DIM
        return GPT(ModelConfig(self.layers, self.width, heads, heads, 2 * self.width))

    def shape(self, count: jax.typing.ArrayLike) -> jax.Array:
        """The schedule of every rate, between 0 and 1: a linear rise, then half a cosine to 0."""
        warmup = min(self.warmup, self.steps // 4)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps)
        return jnp.asarray(schedule(jnp.asarray(count)))

    def batches(self, corpus: Corpus, seed: int) -> np.ndarray:
        """The windows of all steps, `(steps, batch, length + 1)`."""
        return np.stack(
            [
                training_batch(
                    corpus.train,
                    seed=seed,
                    step=step,
                    batch_size=self.batch_size,
                    length=self.length,
                )
                for step in range(self.steps)
            ]
        )

    def scored(self, corpus: Corpus) -> np.ndarray:
        """The windows that every run is scored on, of files that none trains on."""
        return scoring_batch(corpus.validation, windows=self.score_windows, length=self.length)


Watch = Callable[[Any, Any], Mapping[str, jax.Array]]


def compiled(
    task: Task,
    build: Callable[..., optax.GradientTransformationExtraArgs],
    watch: Watch = lambda params, max_logits: {},
) -> Callable[..., Any]:
    """Returns a compiled run `(seed, batches, scored, *settings)`.

    Args:
        task: What is trained.
        build: The optimizer from the settings, which are traced.
        watch: What to record at every step, from the parameters before it and its maxima.

    Returns:
        A function to the loss on `scored` after the last step, the training losses, what was
        watched, each `(steps, ...)`, and the last parameters.
    """
    model = task.model

    def run(seed: jax.Array, batches: jax.Array, scored: jax.Array, *settings: jax.Array) -> Any:
        tx = build(*settings)
        params = model.init(jax.random.key(seed), batches[0, :, :-1])["params"]

        def step(carry: Any, tokens: jax.Array) -> Any:
            params, state = carry
            (loss, max_logits), gradients = jax.value_and_grad(
                lambda p: next_byte_loss(model, p, tokens), has_aux=True
            )(params)
            updates, state = tx.update(gradients, state, params, max_logits=max_logits)
            new = optax.apply_updates(params, updates)
            return (new, state), (loss, watch(params, max_logits))

        (params, _), (losses, watched) = jax.lax.scan(step, (params, tx.init(params)), batches)
        return next_byte_loss(model, params, scored)[0], losses, watched, params

    return jax.jit(run)


def number(value: Any, digits: int = 4) -> float | None:
    """Returns a rounded number; None for one that is not finite, which JSON does not have.

    Example:
        >>> number(2.00004), number(float("nan"))
        (2.0, None)
    """
    value = float(value)
    return round(value, digits) if math.isfinite(value) else None


def measure(
    name: str,
    options: Namespace,
    tasks: Iterable[Task],
    cases: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Runs every case, and stores all of them after each."""
    described = [asdict(task) for task in tasks]
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append({**case, **run(case)})
        print(rows[-1], flush=True)
        store(name, {"tasks": described, "rows": rows}, options)
