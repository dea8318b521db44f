"""The training loop that every example shares: settings, one compiled step, records of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc
from common.data import PARTS, Corpus, scoring_batch, training_batch
from common.model import GPT, ModelConfig, next_byte_loss

Record = dict[str, float | int]
_State = TypeVar("_State")


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of a run, in Python values; checked once, here."""

    optimizer: str = "muonclip"
    learning_rate: float | None = None
    steps: int = 400
    threshold: float = 20.0
    seed: int = 0
    batch_size: int = 16
    length: int = 64
    warmup: int | None = None
    weight_decay: float | None = None
    score_every: int = 10
    score_on: str = "held_out"
    score_windows: int = 64
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"No optimizer is called {self.optimizer!r}; write one of {', '.join(OPTIMIZERS)}."
            )
        if self.score_on not in PARTS:
            raise ValueError(
                f"score_on must be one of {sorted(set(PARTS))}, got {self.score_on!r}."
            )
        for name in ("steps", "batch_size", "length", "score_every", "score_windows", "threshold"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}.")

    @property
    def rate(self) -> float:
        """The peak learning rate: the one given, or the optimizer's best of `make comparison`."""
        best = OPTIMIZERS[self.optimizer].best_rate
        return best if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """The weight decay: the one given, or the optimizer's best of `make comparison`."""
        best = OPTIMIZERS[self.optimizer].best_decay
        return best if self.weight_decay is None else self.weight_decay

    def schedule(self) -> optax.Schedule:
        """A linear rise, then half a cosine to zero."""
        best = OPTIMIZERS[self.optimizer].best_warmup
        warmup = min(best if self.warmup is None else self.warmup, self.steps // 4)
        return optax.warmup_cosine_decay_schedule(0.0, self.rate, warmup, self.steps)


def adamw(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """AdamW with Kimi K2's betas; embeddings and matrices decay, norms do not."""
    return optax.with_extra_args_support(
        optax.adamw(
            settings.schedule(),
            b1=0.9,
            b2=0.95,
            weight_decay=settings.decay,
            mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1),
        )
    )


def muon(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """The same as `muonclip` with the clip left out."""
    return mc.muonclip(settings.schedule(), weight_decay=settings.decay, qk_clip_threshold=None)


def muonclip(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices, AdamW for the rest, QK-Clip at the end, and whether it had effect."""
    tx = mc.muonclip(
        settings.schedule(),
        weight_decay=settings.decay,
        qk_clip_threshold=settings.threshold,
    )
    return mc.metrics(tx, qk_clip_threshold=settings.threshold)


class Optimizer(NamedTuple):
    """How to build an optimizer, and what `make comparison` found best for it."""

    build: Any
    best_rate: float
    best_decay: float
    best_warmup: int
    clips: bool


OPTIMIZERS = {
    "muonclip": Optimizer(muonclip, 0.0114, 1.0, 20, clips=True),
    "muon": Optimizer(muon, 0.016, 0.604, 60, clips=False),
    "adamw": Optimizer(adamw, 0.004, 1.0, 60, clips=False),
}


class State(NamedTuple):
    """What the next step needs; a checkpoint holds this and nothing else."""

    step: jax.Array  # []
    params: Any
    optimizer: Any


class Training:
    """One run's model, optimizer and text, with its step compiled.

    Args:
        settings: What decides the numbers.
        corpus: The text.
        model: A language model that records its largest logits; None is the GPT of the settings.
    """

    def __init__(self, settings: Settings, corpus: Corpus, model: nn.Module | None = None):
        self.settings = settings
        self.text = corpus.train
        self.model = GPT(settings.model) if model is None else model
        self.tx = OPTIMIZERS[settings.optimizer].build(settings)
        self.scored = scored_windows(settings, corpus)
        # The old parameters and moments are given up for the new ones: no second copy of either.
        self.step = jax.jit(self._step, donate_argnums=0)
        self.score = jax.jit(lambda params, tokens: next_byte_loss(self.model, params, tokens)[0])

    def init(self) -> State:
        """Returns the state before the first step."""
        tokens = jnp.zeros((1, self.settings.length), jnp.uint8)
        params = self.model.init(jax.random.key(self.settings.seed), tokens)["params"]
        return State(step=jnp.zeros((), jnp.int32), params=params, optimizer=self.tx.init(params))

    def _step(self, state: State, tokens: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        """One update; the maxima go to the optimizer just as the attention recorded them."""
        loss_and_maxima = partial(next_byte_loss, self.model)
        (loss, max_logits), gradients = jax.value_and_grad(
            lambda params: loss_and_maxima(params, tokens), has_aux=True
        )(state.params)
        updates, optimizer = self.tx.update(
            gradients, state.optimizer, state.params, max_logits=max_logits
        )
        params = optax.apply_updates(state.params, updates)
        clips = OPTIMIZERS[self.settings.optimizer].clips
        threshold = self.settings.threshold if clips else jnp.inf
        info = mc.qk_clip_info(state.params, max_logits, threshold=threshold)
        record = step_record(self.settings, state.step, loss, info) | self.observe(max_logits)
        record |= clip_effect(optimizer, params)
        return State(step=state.step + 1, params=params, optimizer=optimizer), record

    def observe(self, recorded: Any) -> dict[str, jax.Array]:
        """What a model that records more than its maxima adds to each record: scalars by name."""
        return {}

    def batch(self, step: int) -> Any:
        """The windows that a step trains on, from the seed and the step alone."""
        return step_windows(self.settings, self.text, step)

    def run(self, state: State) -> Iterator[tuple[State, list[Record]]]:
        """Trains to the end; what it yields is described at the function `run`."""
        return run(
            self.settings,
            state,
            step=self.step,
            score=lambda state: self.score(state.params, self.scored),
            batch=self.batch,
            begin=int(state.step),
        )


def step_record(settings: Settings, step: Any, loss: Any, info: mc.QKClipInfo) -> dict[str, Any]:
    """Returns what every example records of a step; each may add scalars of its own."""
    clip = info.scalars("clip", blocks=False)
    return {
        "train_loss": loss,
        "learning_rate": settings.schedule()(step),
        "largest_logit": clip["clip/max_logit"],
        "clipped_heads": clip["clip/clipped_heads"],
        "smallest_gamma": clip["clip/min_gamma"],
    }


def clip_effect(optimizer: Any, params: Any) -> dict[str, jax.Array]:
    """Returns for how many steps in a row a clip lowered no maximum, where `mc.metrics` counts."""
    if not isinstance(optimizer, mc.MetricsState):
        return {}
    blocks = mc.read_metrics(optimizer, params).clips_without_effect
    return {"clips_without_effect": jnp.max(jnp.stack(list(blocks.values())))} if blocks else {}


def step_windows(settings: Settings, text: np.ndarray, step: int) -> np.ndarray:
    """Returns the windows that a step trains on, from the seed and the step alone."""
    return training_batch(
        text,
        seed=settings.seed,
        step=step,
        batch_size=settings.batch_size,
        length=settings.length,
    )


def scored_windows(settings: Settings, corpus: Corpus) -> np.ndarray:
    """Returns the windows that the held-out loss is taken over."""
    return scoring_batch(
        corpus.part(settings.score_on), windows=settings.score_windows, length=settings.length
    )


def run(
    settings: Settings,
    state: _State,
    *,
    step: Callable[[_State, Any], tuple[_State, dict[str, jax.Array]]],
    score: Callable[[_State], jax.Array],
    batch: Callable[[int], Any],
    begin: int = 0,
) -> Iterator[tuple[_State, list[Record]]]:
    """Trains to the end, and yields every `score_every` steps the state and the new records.

    Nothing waits for the device in between, so that the next batch is cut while a step runs.
    The held-out loss, in the last record of each list, is the one after that step's update.
    A step that donates its state takes its memory: save it before the next one is asked for.

    Args:
        settings: The run's.
        state: What the first step gets; anything that `step` takes and returns.
        step: The compiled step: state and windows in, state and flat scalars out.
        score: The compiled held-out loss.
        batch: The windows of a step.
        begin: The step that the state is at.
    """
    pending, start = [], time.perf_counter()
    for number in range(begin, settings.steps):
        state, record = step(state, batch(number))
        pending.append(record)
        if (number + 1) % settings.score_every and number + 1 < settings.steps:
            continue
        scored = score(state)
        records = [
            {"step": number + 2 - len(pending) + i} | {k: v.item() for k, v in values.items()}
            for i, values in enumerate(jax.device_get(pending))
        ]
        records[-1][f"{settings.score_on}_loss"] = float(scored)
        now = time.perf_counter()
        speed = len(pending) * settings.batch_size * settings.length / (now - start)
        yield state, [record | {"tokens_per_second": round(speed)} for record in records]
        pending, start = [], time.perf_counter()
