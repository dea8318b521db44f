"""What a CPU saves by computing a triangle of blocks of a symmetric product.

    python benchmarks/block_products.py

`b R + c R R` of one 768 x 768 matrix, as a step of Newton-Schulz has it, by XLA alone: the whole
product, what the library does (2 x 2 blocks written into one array), the same with the scaling
before the blocks are joined, joined by concatenation or by a selection, and 3 x 3 blocks. "product
alone" is the ceiling: the whole product with nothing before or after it. Contenders take turns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.harness import interleave, parser, ratio, store, summary
from muonclip_jax.kernels.symmetric import matmul, symmetric_product

ROWS = 768
#: Products in a row, so that one run lasts some tens of milliseconds.
CHAIN = 10
B, C = 0.5, 0.1
WHOLE = "whole"


def whole(r: jax.Array) -> jax.Array:
    """The product in full."""
    return C * matmul(r, r) + B * r


def ours(r: jax.Array) -> jax.Array:
    """What the library does on a CPU."""
    return symmetric_product(r, r, r, alpha=C, beta=B, implementation="xla")


def _upper(r: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    half = len(r) // 2
    upper = C * matmul(r[:half], r) + B * r[:half]
    corner = C * matmul(r[half:], r[:, half:]) + B * r[half:, half:]
    return upper, corner, half


def scaled_first(r: jax.Array) -> jax.Array:
    """Scaling and addend before the blocks are written into one array."""
    upper, corner, half = _upper(r)
    result = jnp.pad(upper, [(0, len(r) - half), (0, 0)])
    result = result.at[half:, :half].set(upper[:, half:].T)
    return result.at[half:, half:].set(corner)


def concatenated(r: jax.Array) -> jax.Array:
    """Blocks joined by concatenation."""
    upper, corner, half = _upper(r)
    lower = jnp.concatenate([upper[:, half:].T, corner], axis=1)
    return jnp.concatenate([upper, lower])


def selected(r: jax.Array) -> jax.Array:
    """Blocks joined by a selection, in one loop."""
    upper, corner, half = _upper(r)
    rest = len(r) - half
    first = lax.broadcasted_iota(jnp.int32, r.shape, 0) < half
    left = lax.broadcasted_iota(jnp.int32, r.shape, 1) < half
    below = jnp.pad(upper.T, [(0, 0), (0, rest)])
    last = jnp.pad(corner, [(half, 0), (half, 0)])
    return jnp.where(first, jnp.pad(upper, [(0, rest), (0, 0)]), jnp.where(left, below, last))


def nine_blocks(r: jax.Array) -> jax.Array:
    """3 x 3 blocks, six of them computed."""
    size = len(r) // 3
    result = jnp.zeros_like(r)
    for start in range(0, len(r), size):
        rows = slice(start, start + size)
        row = C * matmul(r[rows], r[:, start:]) + B * r[rows, start:]
        result = result.at[rows, start:].set(row)
        result = result.at[start + size :, rows].set(row[:, size:].T)
    return result


CONTENDERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    WHOLE: whole,
    "ours": ours,
    "scaled first": scaled_first,
    "concatenated": concatenated,
    "selected": selected,
    "3 x 3 blocks": nine_blocks,
    "product alone": lambda r: matmul(r, r),
}


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "block_products")
    made.set_defaults(rounds=21)
    options = made.parse_args()
    rows = 12 if options.smoke else ROWS
    drawn = np.random.default_rng(0).standard_normal((rows, rows))
    r = jnp.asarray((drawn + drawn.T) / np.linalg.norm(drawn + drawn.T, 2), jnp.float32)
    runs: dict[str, Callable[[], Any]] = {}
    for name, function in CONTENDERS.items():
        if name != "product alone":
            np.testing.assert_allclose(function(r), whole(r), atol=1e-6, err_msg=name)

        def chain(x: jax.Array, function: Callable[[jax.Array], jax.Array] = function) -> Any:
            for _ in range(CHAIN):
                x = function(x)
            return x

        compiled = jax.jit(chain).lower(r).compile()
        runs[name] = lambda compiled=compiled: compiled(r)
    seconds = interleave(runs, 2 if options.smoke else options.rounds)
    found = []
    for name, times in seconds.items():
        each = [one / CHAIN for one in times]
        record = {"contender": name, "seconds": summary(each)}
        record["over_whole"] = ratio(times, seconds[WHOLE])
        found.append(record)
        print(f"{name}: {1e3 * record['seconds']['median']:.3f} ms", flush=True)
    store("block_products", {"rows": found, "size": rows}, options)


if __name__ == "__main__":
    main()
