"""What recording the largest logits costs a training step of attention.

Three programs compute the output and the gradients of query, key and value: ours, which returns
the maxima too; ours without recording, otherwise the same; and `jax.nn.dot_product_attention`.
They run in turns, so that a busy machine is busy for all of them, and medians are compared. The
shapes are those of GPT-2's heads (64) and of Llama's (128).

    python benchmarks/attention_recording.py [--quick]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax.attention import attention_max_logits, dot_product_attention
from muonclip_jax.attention.arguments import read_arguments
from muonclip_jax.attention.xla import attend_xla

RESULTS = Path(__file__).parent / "results" / "attention_recording.json"
HEADS = 8


def without_recording(query: jax.Array, key: jax.Array, value: jax.Array, **keywords: Any) -> Any:
    """Computes what `dot_product_attention` does, but no maxima."""
    arguments = read_arguments(
        query,
        key,
        value,
        None,
        None,
        scale=None,
        query_seq_lengths=None,
        key_value_seq_lengths=None,
        local_window_size=None,
        **keywords,
    )
    out, _ = attend_xla(arguments, record=False)
    return out.reshape(query.shape)


PROGRAMS: dict[str, Callable[..., tuple[jax.Array, Any]]] = {
    "recording": dot_product_attention,
    "without recording": lambda *a, **k: (without_recording(*a, **k), None),
    "jax.nn": lambda *a, **k: (jax.nn.dot_product_attention(*a, **k), None),
}


def training_step(attend: Callable[..., tuple[jax.Array, Any]], is_causal: bool) -> Any:
    """Returns the jitted output, maxima and gradients of one attention."""

    def loss(query, key, value, cotangent):
        out, max_logits = attend(query, key, value, is_causal=is_causal)
        return jnp.vdot(out, cotangent), max_logits

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def measure(length: int, head_dim: int, is_causal: bool, rounds: int) -> dict[str, Any]:
    """Times the three programs in turns and checks that they agree."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, length, HEADS, head_dim)
    arguments = [jax.random.normal(key, shape) for key in keys]
    steps = {name: training_step(attend, is_causal) for name, attend in PROGRAMS.items()}
    answers = {name: jax.block_until_ready(step(*arguments)) for name, step in steps.items()}

    (_, max_logits), expected = answers["recording"]
    exact = attention_max_logits(*arguments[:2], is_causal=is_causal)
    assert jnp.allclose(max_logits, exact, rtol=1e-5), "the maxima are not the maxima"
    for _, gradients in answers.values():
        for actual, wanted in zip(gradients, expected, strict=True):
            assert jnp.allclose(actual, wanted, rtol=1e-3, atol=1e-4), "the gradients differ"

    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        names = list(steps) if turn % 2 else list(reversed(steps))
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*arguments))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    return {
        "shape": shape,
        "is_causal": is_causal,
        "rounds": rounds,
        "median_seconds": medians,
        "fastest_seconds": fastest,
        # Pairs of neighbouring runs: what the machine does to both cancels.
        "recording_over_without": statistics.median(
            a / b for a, b in zip(times["recording"], times["without recording"], strict=True)
        ),
        "fastest_recording_over_without": fastest["recording"] / fastest["without recording"],
        "recording_over_jax_nn": statistics.median(
            a / b for a, b in zip(times["recording"], times["jax.nn"], strict=True)
        ),
    }


def main() -> None:
    """Measures, prints and, unless quick, stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short shape, nothing stored")
    options = parser.parse_args()
    shapes = [(256, 64)] if options.quick else [(2048, 64), (2048, 128)]
    rows = []
    for length, head_dim in shapes:
        for is_causal in (True, False):
            row = measure(length, head_dim, is_causal, 3 if options.quick else 11)
            rows.append(row)
            print(
                f"T={length} head={head_dim} causal={is_causal}: recording costs "
                f"{100 * (row['recording_over_without'] - 1):+.1f} % "
                f"(fastest runs {100 * (row['fastest_recording_over_without'] - 1):+.1f} %), "
                f"{row['recording_over_jax_nn']:.2f} x jax.nn",
                flush=True,
            )
    if options.quick:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "processor": _processor(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
