"""What recording the largest logits costs a training step of attention.

Programs compute the output and the gradients: ours, which returns the maxima too; ours whose maxima
are not used, so that XLA drops them; `jax.nn.dot_product_attention`; on a GPU cuDNN's with and
without the bound. The shapes are those of GPT-2's heads (64) and of Llama's (128).

    PYTHONPATH=. python benchmarks/attention_recording.py [--smoke]
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import interleave, parser, ratio, store
from muonclip_jax.attention.dot_product import attention_max_logits, dot_product_attention

HEADS = 8
#: Longest sequence for which `jax.nn`'s attention by XLA, which keeps all logits, is compared.
_MATERIALISED = 4096


def alone(implementation: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns attention by `jax.nn`, without maxima."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return lambda *a, **k: (attend(*a, **k), None)


def programs(dtype: str, length: int) -> dict[str, Callable[..., tuple[jax.Array, Any]]]:
    """Returns what is compared on this platform, those that record first."""
    found = {
        "recording": dot_product_attention,
        "without recording": lambda *a, **k: (dot_product_attention(*a, **k)[0], None),
    }
    if length <= _MATERIALISED:  # XLA's own keeps all logits: 17 GB for 64 heads at 8192
        found["jax.nn"] = alone(None)
    if jax.default_backend() == "gpu" and dtype != "float32":
        found |= {
            "cudnn": alone("cudnn"),
            "cudnn and bound": functools.partial(dot_product_attention, implementation="cudnn"),
        }
    return found


#: What recording costs: a program over the same attention without maxima.
RATIOS = {
    "recording_over_without": ("recording", "without recording"),
    "recording_over_jax_nn": ("recording", "jax.nn"),
    "cudnn_and_bound_over_cudnn": ("cudnn and bound", "cudnn"),
}


def training_step(attend: Callable[..., tuple[jax.Array, Any]], is_causal: bool) -> Any:
    """Returns the jitted output, maxima and gradients of one attention."""

    def loss(query, key, value, cotangent):
        out, max_logits = attend(query, key, value, is_causal=is_causal)
        return jnp.sum(out * cotangent, dtype=jnp.float32), max_logits

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def check(answers: dict[str, Any], exact: Any, tolerance: float) -> None:
    """Checks that all programs compute the same gradients, and the maxima that they should."""
    _, expected = answers["without recording"]
    for name, ((_, max_logits), gradients) in answers.items():
        for actual, wanted in zip(gradients, expected, strict=True):
            error = jnp.max(jnp.abs(actual - wanted)) / jnp.max(jnp.abs(wanted))
            assert error < tolerance, f"the gradients of {name!r} differ by {error}"
        if max_logits is not None and "bound" not in name:
            assert jnp.allclose(max_logits, exact, rtol=tolerance), f"the maxima of {name!r} differ"


def measure(length: int, head_dim: int, is_causal: bool, dtype: str, rounds: int) -> dict[str, Any]:
    """Times the interleaved programs and checks that they agree."""
    on_cpu = jax.default_backend() == "cpu"
    # An accelerator gets enough work to hide what launching it costs.
    batch, repeats = (1, 1) if on_cpu else (8, max(2, 32768 // length))
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (batch, length, HEADS, head_dim)
    arguments = [jax.random.normal(key, shape, dtype) for key in keys]
    steps = {
        name: training_step(attend, is_causal) for name, attend in programs(dtype, length).items()
    }
    answers = {name: jax.block_until_ready(step(*arguments)) for name, step in steps.items()}
    exact = attention_max_logits(*arguments[:2], is_causal=is_causal, implementation="xla")
    check(answers, exact, 1e-4 if on_cpu else 3e-2)

    runs = {name: functools.partial(step, *arguments) for name, step in steps.items()}
    times = interleave(runs, rounds, warmup=0 if on_cpu else 1, in_a_row=repeats)
    known = {
        name: (times[a], times[b]) for name, (a, b) in RATIOS.items() if a in times and b in times
    }
    return {
        "shape": shape,
        "dtype": dtype,
        "is_causal": is_causal,
        "rounds": rounds,
        "median_seconds": {n: statistics.median(t) for n, t in times.items()},
        "fastest_seconds": {n: min(t) for n, t in times.items()},
        # Runs of the same round: what the machine does to both cancels.
        **{name: ratio(a, b)["median"] for name, (a, b) in known.items()},
        **{f"fastest_{name}": min(a) / min(b) for name, (a, b) in known.items()},
    }


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "attention_recording")
    made.set_defaults(rounds=11)
    options = made.parse_args()
    shapes = [(256, 64)] if options.smoke else [(2048, 64), (2048, 128)]
    dtypes = ["float32"] if jax.default_backend() == "cpu" else ["bfloat16", "float32"]
    rows = []
    for (length, head_dim), dtype, is_causal in itertools.product(shapes, dtypes, (True, False)):
        rounds = 3 if options.smoke else options.rounds
        row = measure(length, head_dim, is_causal, dtype, rounds)
        rows.append(row)
        shown = {name: round(row[name], 3) for name in RATIOS if name in row}
        print(f"T={length} head={head_dim} causal={is_causal} {dtype}: {shown}", flush=True)
    store("attention_recording", {"rows": rows}, options)


if __name__ == "__main__":
    main()
