"""Sweeps QK-Clip's threshold and alpha on a small transformer whose logits grow.

    python benchmarks/settings_clip.py

Two layers of the examples' model, width 128, eight heads with a key each, at twice the rate that is
best there, which lets logits grow. One program serves all runs: threshold and alpha are traced, and
a threshold of infinity is no clip. In the file it is null.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc
from benchmarks.harness import parser
from benchmarks.settings_runs import Task, compiled, load_corpus, measure, number

RATE = 0.032
THRESHOLDS = (None, 50.0, 30.0, 20.0, 14.0, 10.0, 7.0, 5.0, 3.5)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Where alpha is swept: a threshold that clips often.
ALPHA_THRESHOLD = 10.0
SEEDS = (0, 1)


def optimizer(
    task: Task, threshold: jax.Array, alpha: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """MuonClip with everything else at its defaults."""
    return mc.muonclip(
        lambda count: RATE * task.shape(count),
        qk_clip_threshold=threshold,
        qk_clip_alpha=alpha,
    )


def norms(params: Any) -> dict[str, float]:
    """Returns the RMS over layers of the Frobenius norms of the query and the key kernels."""
    found: dict[str, list[float]] = {"query": [], "key": []}
    for name, block in params.items():
        if name.startswith("block_"):
            for side, values in found.items():
                values.append(float(jnp.linalg.norm(block["attention"][side]["kernel"])))
    return {f"{side}_norm": float(np.sqrt(np.mean(np.square(v)))) for side, v in found.items()}


def cases() -> Iterator[dict[str, Any]]:
    """Every run."""
    for seed in SEEDS:
        for threshold in THRESHOLDS:
            yield {"threshold": threshold, "alpha": 0.5, "seed": seed}
        for alpha in ALPHAS:
            yield {"threshold": ALPHA_THRESHOLD, "alpha": alpha, "seed": seed}


def main() -> None:
    """Sweeps and stores."""
    options = parser(__doc__, "settings_clip").parse_args()
    task = Task(32, 1, 4) if options.smoke else Task(128, 2, 150)
    corpus = load_corpus()

    def watch(params: Any, max_logits: Any) -> dict[str, jax.Array]:
        info = mc.qk_clip_info(params, max_logits, threshold=jnp.inf)
        return {"heads": jnp.stack(list(info.max_logits.values()))}

    program = compiled(task, lambda *settings: optimizer(task, *settings), watch)

    def run(case: Any) -> dict[str, Any]:
        threshold = np.inf if case["threshold"] is None else case["threshold"]
        final, _, watched, params = program(
            case["seed"],
            task.batches(corpus, case["seed"]),
            task.scored(corpus),
            jnp.asarray(threshold, jnp.float32),
            jnp.asarray(case["alpha"], jnp.float32),
        )
        heads = np.asarray(watched["heads"])  # (steps, layers, heads)
        largest = heads.max(axis=(1, 2))
        return {
            "validation_loss": number(final),
            "largest_logit": number(largest.max(), 2),
            "largest_logit_at_end": number(largest[-1], 2),
            "clipped_share": number((heads > threshold).mean()),
            **{key: number(value, 3) for key, value in norms(params).items()},
        }

    made = list(cases())[:: 8 if options.smoke else 1]
    measure("settings_clip", options, [task], made, run)


if __name__ == "__main__":
    main()
