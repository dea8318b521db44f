"""Carries rate and decay from a small model to one of ten million parameters, by rule.

    python examples/scale_up.py               hours on a CPU; started again, it goes on
    python examples/scale_up.py --smoke

AdamW and MuonClip are swept over rates at width 96 for a quarter of the steps. The best rate and
its decay are carried over by `carried`, and each optimizer trains the large model once.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from common import plots, program
from common.data import load_corpus
from common.model import ModelConfig, next_byte_loss
from common.records import describe, machine, open_folder, read_records
from common.training import OPTIMIZERS, Record, Settings, Training

SMALL, LARGE = ModelConfig(), ModelConfig(6, 384, 6, 3, 1024)
#: How the best rate depends on the width: of AdamW by its inverse (Yang et al. 2022, arXiv
#: 2203.03466), of Muon under `consistent_rms=0.2` by its inverse square root (docs/comparison.md).
POWERS = {"adamw": 1.0, "muonclip": 0.5}


def _rounded(x: float) -> float:
    return float(f"{x:.3g}")


def carried(best: Settings, model: ModelConfig, steps: int) -> Settings:
    """Returns the settings of a larger model and a longer run.

    The rate falls by a power of the width, and by the square root of the steps. The decay is such
    that the sum of `rate * decay` over all steps stays what it was.
    """
    rate = best.rate * (best.model.width / model.width) ** POWERS[best.optimizer]
    rate *= (best.steps / steps) ** 0.5
    decay = best.decay * best.rate * best.steps / (rate * steps)
    changed = {"learning_rate": _rounded(rate), "weight_decay": _rounded(decay)}
    return replace(best, **changed, model=model, steps=steps, score_every=50, score_on="held_out")


def trained(runs: Path, settings: Settings) -> list[Record]:
    """Trains a run, goes on with it, or reads it where it is finished."""
    folder = runs / f"{settings.optimizer}_{settings.model.width}_{settings.rate:g}"
    resume = (folder / "settings.json").exists()
    open_folder(folder, describe(settings), resume=resume)
    if resume and len(records := read_records(folder)) == settings.steps:
        return records
    training = Training(settings, load_corpus())
    _, records = program.train_resumable(
        training, folder, resume=resume, checkpoint_every=settings.score_every
    )
    return records


def swept(runs: Path, settings: Settings, *, smoke: bool) -> Settings:
    """Returns the settings with the best rate on validation files; it lies between others."""
    factor, best, losses = 2**0.5, settings.rate, dict[float, float]()
    tried = [settings.rate * factor**power for power in (-1, 0, 1)]
    while tried:
        for rate in tried:
            records = trained(runs, replace(settings, learning_rate=_rounded(rate)))
            losses[rate] = records[-1]["validation_loss"]
            print(f"{settings.optimizer}, rate {rate:.3g}: validation loss {losses[rate]:.3f}")
        best = min(losses, key=losses.__getitem__)
        ends = {min(losses): 1 / factor, max(losses): factor}
        tried = [best * ends[best]] if best in ends and not smoke else []
    return replace(settings, learning_rate=_rounded(best))


def step_seconds(settings: Sequence[Settings], rounds: int = 3) -> dict[str, float]:
    """Returns the fastest step with each optimizer, and of the gradients alone, interleaved."""
    seconds = dict[str, float]()
    trainings = [Training(each, load_corpus()) for each in settings]
    first = trainings[0]
    gradients = jax.jit(jax.grad(partial(next_byte_loss, first.model), has_aux=True))
    states: list[Any] = [training.init() for training in trainings]
    params = first.init().params
    for number in range(-1, rounds):
        for index, training in enumerate(trainings):
            start = time.perf_counter()
            states[index], _ = jax.block_until_ready(
                training.step(states[index], training.batch(number + 1))
            )
            _keep_least(seconds, training.settings.optimizer, start, number)
        start = time.perf_counter()
        jax.block_until_ready(gradients(params, first.batch(number + 1)))
        _keep_least(seconds, "none", start, number)
    return seconds


def _keep_least(seconds: dict[str, float], name: str, start: float, number: int) -> None:
    if number >= 0:  # the round before compiles
        seconds[name] = min(time.perf_counter() - start, seconds.get(name, float("inf")))


def row(settings: Settings, records: Sequence[Record]) -> dict[str, Any]:
    """Returns what is stored of a run, every `score_every` steps."""
    scored = [record for record in records if "held_out_loss" in record]
    every = settings.score_every
    tokens = settings.batch_size * settings.length
    return {
        "what": "run",
        "optimizer": settings.optimizer,
        "rate": settings.rate,
        "decay": settings.decay,
        "steps": settings.steps,
        "seconds": round(sum(tokens * every / record["tokens_per_second"] for record in scored)),
        "step": [record["step"] for record in scored],
        "held_out_loss": [round(record["held_out_loss"], 4) for record in scored],
        "largest_logit": [
            round(max(r["largest_logit"] for r in records[i : i + every]), 2)
            for i in range(0, len(records), every)
        ],
    }


def draw(rows: Sequence[Mapping[str, Any]], threshold: float, path: Path) -> None:
    """Draws held-out loss and largest logit of the large runs."""
    drawn, (left, right) = plots.figure(2)
    for each in rows:
        name = each["optimizer"]
        style = {"color": plots.COLORS[name], "label": plots.NAMES[name]}
        left.plot(each["step"], each["held_out_loss"], **style)
        right.plot(each["step"], each["largest_logit"], **style)
    plots.draw_threshold(right, threshold)
    left.set_ylabel("held-out loss, nats a byte")
    right.set_ylabel("largest logit of 50 steps")
    right.legend(fontsize="small")
    plots.save(drawn, path)


def main() -> None:
    """Sweeps, carries over, trains and writes `scale_up.json` and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps")
    options = parser.parse_args()
    small, large, batch, steps = SMALL, LARGE, {"batch_size": 32, "length": 256}, 1000
    if options.smoke:
        small, large = replace(SMALL, layers=1, width=16), replace(SMALL, layers=1, width=32)
        batch, steps = {"batch_size": 2, "length": 16}, 100
    runs: Path = options.runs / "scale_up"
    chosen = []
    for name in POWERS:
        settings = Settings(name, steps=steps // 4, model=small, score_on="validation", **batch)
        settings = replace(settings, weight_decay=OPTIMIZERS[name].best_decay)
        chosen.append(carried(swept(runs, settings, smoke=options.smoke), large, steps))
    seconds = step_seconds(chosen)
    rows = [row(settings, trained(runs, settings)) for settings in chosen]
    for each in rows:
        share = 1 - seconds["none"] / seconds[each["optimizer"]]
        print(
            f"{each['optimizer']}: rate {each['rate']:g}, decay {each['decay']:g}, held-out loss "
            f"{each['held_out_loss'][-1]:.3f}, largest logit {max(each['largest_logit']):.1f}, "
            f"optimizer {100 * share:.0f} % of a step"
        )
    described = {"machine": machine(), "rows": [{"what": "step", "seconds": seconds}, *rows]}
    (runs / "scale_up.json").write_text(json.dumps(described, indent=1) + "\n")
    draw(rows, chosen[-1].threshold, runs / "scale_up.png")
    print(f"picture: {runs / 'scale_up.png'}")


if __name__ == "__main__":
    main()
