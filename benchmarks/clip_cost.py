"""What QK-Clip costs: GPT-2 XL's blocks, against reading and writing their query and key kernels.

    python benchmarks/clip_cost.py

48 blocks of width 1600 with 25 heads of 64, as three kinds of trees. `apply_qk_clip` is jitted with
its parameters donated, as in a training step. The baseline, interleaved with it, is a jitted pass
that multiplies the same queries and keys by a constant, in arrays of their own.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, parser, ratio, store
from muonclip_jax import apply_qk_clip

WIDTH, HEADS, SIZE, BLOCKS = 1600, 25, 64, 48
THRESHOLD = 100.0
#: Little over the threshold: thousands of runs hardly change the weights.
OVER = 1.0001
BASELINE = "read and write once"
FACTOR = 1 - 2**-7  # a bfloat16 number: one that rounds to 1 would be compiled away
TREES = ("a leaf a layer", "stacked layers", "fused q k v")
Tree = dict[str, Any]


def tree_of(name: str, blocks: int, dtype: str) -> tuple[Tree, Tree]:
    """Returns the attention of all blocks, and the shapes of their maxima."""

    def normal(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)

    if name == "stacked layers":
        kernels = {n: normal(j, blocks, WIDTH, HEADS, SIZE) for j, n in enumerate("qk")}
        return {"h": {"attn": kernels}}, {"h/attn": (blocks, HEADS)}
    params = {}
    for i in range(blocks):
        kernels = {n: normal(2 * i + j, WIDTH, HEADS, SIZE) for j, n in enumerate("qk")}
        if name == "fused q k v":
            fused = {"kernel": normal(i, WIDTH, 3 * WIDTH)}
            kernels = {"c_attn": fused, "c_proj": {"kernel": normal(i, WIDTH, WIDTH)}}
        params[f"h_{i}"] = {"attn": kernels}
    return params, {f"h_{i}/attn": (HEADS,) for i in range(blocks)}


def maxima_of(shapes: Tree) -> dict[str, Tree]:
    """Returns maxima with all heads, the first head alone, and no head over the threshold."""
    low = {path: jnp.full(shape, THRESHOLD / 2) for path, shape in shapes.items()}
    high = {path: jnp.full(shape, THRESHOLD * OVER) for path, shape in shapes.items()}
    first = next(iter(low))
    one = {**low, first: low[first].at[(0,) * low[first].ndim].set(THRESHOLD * OVER)}
    return {"all heads": high, "one head": one, "no head": low}


def queries_and_keys(tree: Tree) -> list[Any]:
    """Returns of every leaf the columns that a clip multiplies, none of an output projection."""
    leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    columns = {name: 2 * WIDTH if "c_attn" in name else x.shape[-1] for name, x in leaves.items()}
    return [x[..., : columns[name]] for name, x in leaves.items() if "c_proj" not in name]


def check(params: Tree, maxima: dict[str, Tree]) -> None:
    """Compares the clip with NumPy in float64."""
    for kind, factor in (("all heads", OVER**-0.5), ("no head", 1.0)):
        new, info = apply_qk_clip(params, maxima[kind], threshold=THRESHOLD)
        assert int(info.total_clipped) == (info.total_heads if kind == "all heads" else 0)
        for before, after in zip(queries_and_keys(params), queries_and_keys(new), strict=True):
            expected = np.asarray(before).astype(np.float64) * factor
            error = np.abs(np.asarray(after).astype(np.float64) - expected)
            assert (error <= float(jnp.finfo(before.dtype).eps) * np.abs(expected)).all()


def measure(name: str, blocks: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Times the clip on one tree."""
    params, shapes = tree_of(name, 1, dtype)
    check(params, maxima_of(shapes))
    params, shapes = tree_of(name, blocks, dtype)
    copies = [jnp.array(x, copy=True) for x in queries_and_keys(params)]
    size = sum(x.nbytes for x in copies)
    kept: Tree = {"clip": params, BASELINE: copies}
    del params, copies

    def in_place(key: str, step: Callable[[Any], Any]) -> Callable[[], Any]:
        def run() -> Any:
            kept[key] = step(kept[key])
            return kept[key]

        return run

    def clip(maxima: Tree, tree: Tree) -> Tree:
        return apply_qk_clip(tree, maxima, threshold=THRESHOLD)[0]

    clipping = jax.jit(clip, donate_argnums=1)
    once = jax.jit(lambda tree: [x * FACTOR for x in tree], donate_argnums=0)
    contenders = {BASELINE: in_place(BASELINE, once)} | {
        kind: in_place("clip", functools.partial(clipping, maxima))
        for kind, maxima in maxima_of(shapes).items()
    }
    seconds = interleave(contenders, rounds, warmup=2)
    over = {kind: ratio(seconds[kind], seconds[BASELINE]) for kind in maxima_of(shapes)}
    return {"tree": name, "dtype": dtype, "blocks": blocks, "bytes": size, "over_yardstick": over}


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "clip_cost")
    made.set_defaults(rounds=25)
    options = made.parse_args()
    blocks = 2 if options.smoke else BLOCKS
    rows = []
    for dtype, name in itertools.product(("float32", "bfloat16"), TREES):
        row = measure(name, blocks, dtype, 2 if options.smoke else options.rounds)
        rows.append(row)
        shown = {kind: round(r["median"], 3) for kind, r in row["over_yardstick"].items()}
        print(f"{name}, {dtype}, over {BASELINE}: {shown}", flush=True)
    store("clip_cost", {"width": WIDTH, "heads": HEADS, "head_dim": SIZE, "rows": rows}, options)


if __name__ == "__main__":
    main()
