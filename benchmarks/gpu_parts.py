"""The parts of `benchmarks/gpu.py`: generators of rows, most valuable row first.

Each takes whether sizes are toys, and a function to the seconds that are left.
"""

import dataclasses
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common.data import load_corpus, scoring_batch
from common.model import GPT, ModelConfig, next_byte_loss

import muonclip_jax as mc
from benchmarks import attention_recording, polar_quality, step_time
from benchmarks.harness import interleave, ratio, summary
from benchmarks.matrices import Reference, needed_flops, over_all, spectra
from benchmarks.models import MODELS, Model
from benchmarks.optimizers import FAST, OPTAX, OPTIMIZERS, OURS, ours
from benchmarks.training_runs import train_step
from muonclip_jax.kernels import SYMMETRIC
from muonclip_jax.newton_schulz import apply_polar, plan_polar
from muonclip_jax.newton_schulz.iteration import gram, symmetric_product

Row = dict[str, Any]
Left = Callable[[], float]


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


#: Settings whose answers are checked: the default of `muonclip`, and those one word away.
CHECKED: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "bfloat16, plain": {"ns_dtype": "bfloat16", "ns_method": "standard"},
    "float32": {"ns_dtype": "float32"},
    "minimax4": {"ns_coeffs": "minimax4"},
}


def right(smoke: bool, left: Left) -> Iterator[Row]:
    """Polar factors against float64, one step of a model against the CPU's, the clip, scales."""
    del left
    yield from _step_against_cpu()
    yield from _scales()
    shapes = [(48, 64)] if smoke else [(64, 256), (256, 1024), (768, 768), (768, 3072)]
    for shape in shapes:
        families = spectra(*shape)
        x = jnp.asarray(np.stack(list(families.values())), jnp.float32)
        reference = Reference(np.asarray(x, np.float64))
        for name, settings in CHECKED.items():
            plan = plan_polar(**settings)
            result = np.asarray(jax.jit(functools.partial(apply_polar, plan))(x), np.float64)
            exact = polar_quality.exact_polynomial(plan, reference)
            norms = np.linalg.norm(exact, axis=(1, 2))
            rounding = np.linalg.norm(result - exact, axis=(1, 2)) / norms
            resolved = plan.resolve(x.shape, x.dtype)
            yield {
                "what": "polar factor",
                "shape": shape,
                "settings": name,
                "form": f"{resolved.method}, {resolved.dtype}",
                "finite": bool(np.isfinite(result).all()),
                # Distance from the same polynomial in float64.
                "rounding": {n: float(r) for n, r in zip(families, rounding, strict=True)},
                **over_all(reference.quality(result)),
            }


def _step_against_cpu() -> Iterator[Row]:
    """One `muonclip` step of a small GPT, and the clip, on the device and on the CPU."""
    cpu = jax.devices("cpu")[0]
    model = GPT(ModelConfig(layers=2, width=96))
    tokens: Any = np.random.default_rng(0).integers(0, 256, (4, 65)).astype(np.uint8)
    loss = functools.partial(next_byte_loss, model)
    with jax.default_matmul_precision("highest"):
        with jax.default_device(cpu):
            params: Any = model.init(jax.random.key(0), tokens[:, :-1])["params"]
            for block in ("block_0", "block_1"):  # large logits, so that heads are clipped
                attention = params[block]["attention"]
                attention["query"]["kernel"] = 30 * attention["query"]["kernel"]
            gradient = jax.jit(jax.grad(lambda p: loss(p, tokens), has_aux=True))
            grads, maxima = gradient(params)
        threshold = float(np.median(np.concatenate(jax.tree.leaves(maxima))))
        traces = 0

        def update(tx: Any, params: Any, grads: Any, maxima: Any) -> Any:
            nonlocal traces
            traces += 1
            updates, _ = tx.update(grads, tx.init(params), params, max_logits=maxima)
            return updates

        for name in ("default", "float32"):
            results = []
            for device in (cpu, jax.devices()[0]):
                traces = 0
                settings = {"qk_clip_threshold": threshold, "platform": device.platform}
                tx = mc.muonclip(1e-3, **settings, **CHECKED[name])
                arguments = jax.device_put((params, grads, maxima), device)
                step = jax.jit(functools.partial(update, tx))
                step(*arguments)
                results.append(jax.device_get(step(*arguments)))
            differences = jax.tree.map(
                lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(a)), *results
            )
            yield {
                "what": "one step against the CPU's",
                "settings": name,
                "largest_relative_difference": max(jax.tree.leaves(differences)),
                "traces_of_two_calls": traces,
            }
        params, maxima = jax.device_put((params, maxima), jax.devices()[0])
        clipped, info = jax.jit(functools.partial(mc.apply_qk_clip, threshold=threshold))(
            params, maxima
        )
        _, after = jax.jit(loss)(clipped, tokens)
        before, after = (np.concatenate(jax.tree.leaves(x)) for x in (maxima, after))
        over = before > threshold
        # The first block alone: a clip changes what later blocks see.
        first = slice(0, len(before) // 2)
        yield {
            "what": "clip",
            "clipped_heads": int(over.sum()),
            "largest_relative_distance_from_threshold": float(
                np.abs(after[first][over[first]] / threshold - 1).max(initial=0)
            ),
            "smallest_gamma": float(info.scalars("clip", blocks=False)["clip/min_gamma"]),
        }


def _scales() -> Iterator[Row]:
    """Whether the polar factor is finite and the same for tiny and huge matrices."""
    x = jax.random.normal(jax.random.key(0), (64, 192))
    function = jax.jit(mc.orthogonalize)
    one = function(x)
    for scale in (0.0, 1e-30, 1e-18, 1e-9, 1e9, 1e18, 1e30):
        result = function(x * scale)
        yield {
            "what": "scale",
            "scale": scale,
            "finite": bool(jnp.isfinite(result).all()),
            "largest_difference": float(jnp.abs(result - (one if scale else 0.0)).max()),
        }


IN_A_ROW = 10
FLOAT32 = "ours, float32"
KERNEL = {"ns_implementation": "mosaic_gpu"}
#: Settings of ours, most valuable first.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    FAST: {"ns_coeffs": "minimax4"},
    "ours, minimax4, mosaic_gpu": {"ns_coeffs": "minimax4", **KERNEL},
    OURS: {"ns_coeffs": "keller_jordan"},
    "ours, minimax4, bfloat16": {"ns_coeffs": "minimax4", **CHECKED["bfloat16, plain"]},
    FLOAT32: {"ns_coeffs": "keller_jordan", "ns_dtype": "float32"},
}


def ceiling(smoke: bool) -> float:
    """Returns the FLOP/s of one large product in float16."""
    n, repeats = (64, 2) if smoke else (8192, 20)
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.float16)
    product = jax.jit(
        lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32).astype("f2")
    )
    seconds = interleave({"": functools.partial(product, x, x)}, 3, in_a_row=repeats)[""]
    return 2 * n**3 / statistics.median(seconds)


def steps(smoke: bool, left: Left) -> Iterator[Row]:
    """The optimizer step of GPT-2 small and of a 1.3B model: ours, Optax's, torch's."""
    peak = ceiling(smoke)
    yield {"what": "ceiling", "flops_per_second": peak}
    half = left() / 2
    for name, dtype, until in (("gpt2-small", "float32", half), ("1.3b", "bfloat16", 20)):
        model = MODELS["layers-of-256"].with_layers(1) if smoke else MODELS[name]
        yield from _steps_of(model, name, dtype, peak, smoke, lambda until=until: left() - until)


def _steps_of(
    model: Model, name: str, dtype: str, peak: float, smoke: bool, left: Left
) -> Iterator[Row]:
    grads = step_time.random_gradients(model.tree(dtype))
    numbers = model.dimension_numbers()
    factories = {key: OPTIMIZERS[key] for key in (FAST, OPTAX, "optax.adamw")}
    factories |= {key: functools.partial(ours, **settings) for key, settings in SETTINGS.items()}
    makers: dict[str, Callable[[], Any]] = {
        key: lambda factory=factory: step_time.JaxStep(factory(numbers), grads)
        for key, factory in factories.items()
    }
    if importlib.util.find_spec("torch"):
        made = step_time.torch_steps(grads, numbers)
        makers |= {key: lambda step=step: step for key, step in made.items()}
    for slow in ("torch.optim.Muon, float32", *([FLOAT32] if name == "1.3b" else [])):
        makers.pop(slow, None)
    contenders: dict[str, Any] = {}
    compiling: dict[str, float] = {}
    for contender, make in makers.items():
        start = time.perf_counter()
        if left() < 0:
            break
        try:
            step = make()
            step()
        except Exception as error:
            yield {"model": name, "contender": contender, "error": str(error)[:300]}
            continue
        contenders[contender] = step
        compiling[contender] = time.perf_counter() - start
    # Answers in float64 on the host take minutes for the larger model.
    compared = model.with_layers(0) if name == "1.3b" else model
    rounds = 1 if smoke else 7
    for row in step_time.measure(contenders, compared, grads, rounds, in_a_row=IN_A_ROW):
        contender = row["contender"]
        row |= {"model": name, "dtype": dtype, "in_a_row": IN_A_ROW}
        row["compile_seconds"] = compiling[contender]
        if contender in SETTINGS:
            plan = plan_polar(**{k: v for k, v in SETTINGS[contender].items() if k not in KERNEL})
            needed = sum(
                count * needed_flops(plan.resolve(shape, dtype), *shape)
                for shape, count in model.matrices().items()
            )
            row["needed_share_of_ceiling"] = needed / row["seconds"]["median"] / peak
        yield row


def kernels(smoke: bool, left: Left) -> Iterator[Row]:
    """The symmetric product by the kernel against XLA's: numbers first, then time."""
    cases = [(1, 2048), (1, 4096), (12, 768), (1, 768), (1, 1024), (12, 2048), (1, 8192), (1, 1000)]
    names = [name for name, platform in SYMMETRIC.items() if platform == jax.default_backend()]
    for (batch, n), dtype in itertools.product([(1, 64)] if smoke else cases, ("f2", "bf16")):
        if left() < 10 or (dtype == "bf16" and n not in (64, 2048)):
            continue
        for width in (n, 4 * n) if n < 8192 else (n,):
            key = jax.random.key(n)
            x = jax.random.normal(key, (batch, n, width), jnp.float32) / np.sqrt(width)
            if width == n:
                x = (x + jnp.swapaxes(x, 1, 2)) / 2
            x = x.astype({"f2": jnp.float16, "bf16": jnp.bfloat16}[dtype])
            yield _symmetric_row(x, names, smoke)


def _symmetric_row(x: jax.Array, names: list[str], smoke: bool) -> Row:
    """Compares `x x^T`, with an addend where `x` is square, by every implementation."""
    is_square = x.shape[-1] == x.shape[-2]

    def product(name: str) -> Callable[[], jax.Array]:
        def run(x: jax.Array) -> jax.Array:
            if is_square:
                return symmetric_product(x, x, x, alpha=2.0, beta=-1.0, symmetric=name)
            return gram(x, name)

        return functools.partial(jax.jit(run), x)

    wide = np.asarray(x[:1], np.float32)
    exact = wide @ wide.swapaxes(1, 2)
    exact = 2 * exact - wide if is_square else exact
    functions = {name: product(name) for name in ("xla", *names)}
    row: Row = {"shape": x.shape, "dtype": x.dtype.name, "addend": is_square}
    for name in list(functions):
        try:
            result = functions[name]()
        except Exception as error:
            row[name] = {"error": str(error)[:300]}
            del functions[name]
            continue
        first = np.asarray(result[:1], np.float32)
        row[name] = {
            "error": float(np.abs(first - exact).max() / np.abs(exact).max()),
            "symmetric": bool((result == jnp.swapaxes(result, 1, 2)).all()),
        }
    seconds = interleave(functions, 3 if smoke else 7, in_a_row=2 if smoke else 20)
    for name, times in seconds.items():
        row[name] |= {
            "seconds": summary(times),
            "xla_over_this": ratio(seconds["xla"], times)["median"],
            "whole_flops_per_second": 2 * x.size * x.shape[-2] / statistics.median(times),
        }
    return row


def recording(smoke: bool, left: Left) -> Iterator[Row]:
    """What recording the maxima costs attention's forward and backward pass."""
    cases = [(2048, 64), (8192, 64), (2048, 128), (8192, 128)]
    for (length, head_dim), causal in itertools.product(
        [(128, 16)] if smoke else cases, (True, False)
    ):
        if left() < 10:
            return
        dtype = "bfloat16" if on_gpu() else "float32"
        yield attention_recording.measure(length, head_dim, causal, dtype, 1 if smoke else 5)


#: Peak rates that are tried in short runs: the most steps go to the comparison itself.
RATES = {"adamw": (1e-3, 2e-3), "muonclip": (2e-3, 4e-3)}
DECAY = 0.1
#: Without an optimizer, for the share of the step that one takes.
NONE = "none"


def run(smoke: bool, left: Left) -> Iterator[Row]:
    """Trains GPT-2 small's shape on bytes: AdamW and MuonClip at the better of two rates."""
    config = ModelConfig(12, 768, 12, 12, 2048, attention="cudnn" if on_gpu() else None)
    if smoke:
        config = ModelConfig(1, 16, 2, 2, 32)
    # Steps are run in chunks, one compiled program each.
    batch, length, chunk, short = (2, 16, 2, 4) if smoke else (16, 1024, 25, 75)
    trainer = _Trainer(config, batch, length, chunk)
    with ThreadPoolExecutor() as pool:
        list(pool.map(trainer.compile, (*RATES, NONE)))
    seconds = {}
    for name in (*RATES, NONE):  # the second run of a chunk: what is first used is set up
        seconds[name] = trainer.train(name, 1e-4, 2 * chunk)["chunk_seconds"][-1] / chunk
    yield {"what": "step", "seconds": seconds, "tokens": batch * length, "sizes": str(config)}
    best = {}
    for name, rates in RATES.items():
        losses = {}
        for rate in rates[: 1 if smoke else None]:
            losses[rate] = trainer.train(name, rate, short)["validation_loss"][-1]
            yield {"what": "rate", "optimizer": name, "rate": rate, "loss": losses[rate]}
        best[name] = min(losses, key=losses.__getitem__)
    per_step = sum(seconds[name] for name in RATES)
    steps = 4 if smoke else int((left() - 15) / per_step / chunk) * chunk
    for name, rate in best.items() if steps > 0 else ():
        trained = trainer.train(name, rate, steps)
        settings = {"optimizer": name, "rate": rate, "decay": DECAY, "steps": steps}
        yield {"what": "run", **settings, **trained}


class _Trainer:
    """Compiled chunks of steps of one model on the standard library's text."""

    def __init__(self, config: ModelConfig, batch: int, length: int, chunk: int):
        corpus = load_corpus()
        self.model = GPT(config)
        self.text = jnp.asarray(corpus.train)
        scored = scoring_batch(corpus.validation, windows=2 * batch, length=length)
        self.scored = jnp.asarray(scored).reshape(2, batch, length + 1)
        self.batch, self.length, self.chunk = batch, length, chunk
        self.chunks: dict[str, Any] = {}
        self.score = jax.jit(
            lambda params: jax.lax.map(lambda x: self._loss(params, x)[0], self.scored).mean()
        )

    def _loss(self, params: Any, tokens: jax.Array) -> Any:
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params) if on_gpu() else params
        return next_byte_loss(self.model, low, tokens)

    def _optimizer(self, name: str, rate: Any, steps: Any) -> Any:
        def schedule(count: Any) -> Any:
            warmup = jnp.minimum(1.0, (count + 1) / (0.05 * steps))
            return rate * warmup * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(1, count / steps)))

        if name == "muonclip":
            return mc.muonclip(schedule, weight_decay=DECAY, qk_clip_threshold=100.0)
        adamw = optax.adamw(schedule, b2=0.95, weight_decay=DECAY)
        return optax.with_extra_args_support(optax.set_to_zero() if name == NONE else adamw)

    def compile(self, name: str) -> None:
        """Compiles the chunk of an optimizer's steps."""

        def step(rate: jax.Array, steps: jax.Array, carry: Any, key: jax.Array) -> Any:
            starts = jax.random.randint(key, (self.batch, 1), 0, len(self.text) - self.length)
            tokens = self.text[starts + jnp.arange(self.length + 1)]
            tx = self._optimizer(name, rate, steps)
            return train_step(tx, lambda p: self._loss(p, tokens), carry)

        def chunk(carry: Any, keys: jax.Array, rate: jax.Array, steps: jax.Array) -> Any:
            return jax.lax.scan(functools.partial(step, rate, steps), carry, keys)

        shapes = jax.eval_shape(functools.partial(self.init, name))
        keys = jax.random.split(jax.random.key(0), self.chunk)
        self.chunks[name] = jax.jit(chunk, donate_argnums=0).lower(shapes, keys, 1.0, 1.0).compile()

    def init(self, name: str) -> Any:
        """Returns parameters and state before the first step."""
        # In float32, which cuDNN does not take.
        model = GPT(dataclasses.replace(self.model.config, attention=None))
        params = jax.jit(model.init)(jax.random.key(0), self.scored[0, :1, :65])["params"]
        return params, jax.jit(self._optimizer(name, 1.0, 1.0).init)(params)

    def train(self, name: str, rate: float, steps: int) -> Row:
        """Trains and returns losses, largest logits and seconds of every chunk."""
        carry = self.init(name)
        names = ("step", "train_loss", "validation_loss", "largest_logit", "chunk_seconds")
        columns: dict[str, list[Any]] = {column: [] for column in names}
        for number in range(steps // self.chunk):
            keys = jax.random.split(jax.random.key(number), self.chunk)
            start = time.perf_counter()
            carry, (losses, largest) = self.chunks[name](carry, keys, rate, float(steps))
            loss = float(losses.mean())
            elapsed = time.perf_counter() - start
            values = (float(self.score(carry[0])), float(largest.max()), elapsed)
            for column, value in zip(
                names, ((number + 1) * self.chunk, loss, *values), strict=True
            ):
                columns[column].append(value)
        return columns | {"seconds": sum(columns["chunk_seconds"])}
