"""What QK-Clip costs: GPT-2 XL's blocks, against reading and writing their query and key kernels.

    python benchmarks/clip_cost.py
    python benchmarks/clip_cost.py --blocks 4 --rounds 5                      a quick look

48 blocks of width 1600 with 25 heads of 64, as a tree with a leaf a layer, as one tree with layers
stacked on axis 0, and as GPT-2 keeps them, with queries, keys and values in one kernel
`(1600, 4800)`. `apply_qk_clip` is jitted with its parameters donated, as in a training step, and
timed with all heads, with one head and with no head over the threshold. The yardstick runs in the
same turns: a jitted pass with donation that multiplies the same queries and keys by a constant, in
arrays of their own without any values.

`qk_clip`, the transformation, is timed likewise on updates that are donated. It has its parameters
beside them to read, so its yardstick reads both and writes the updates.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import interleave, parser, ratio, store
from muonclip_jax.clipping import apply_qk_clip
from muonclip_jax.transforms import qk_clip

WIDTH, HEADS, SIZE, BLOCKS = 1600, 25, 64, 48
THRESHOLD = 100.0
YARDSTICK = "read and write once"
CLIP, TRANSFORMATION = "apply_qk_clip", "qk_clip"
FACTOR = 1 - 2**-7  # a bfloat16 number: one that rounds to 1 would be compiled away
Tree = dict[str, Any]


def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def per_layer(blocks: int, dtype: str) -> tuple[Tree, Tree]:
    """A query and a key kernel for every block."""
    shape = (WIDTH, HEADS, SIZE)
    params = {
        f"h_{i}": {"attn": {n: _normal(2 * i + j, shape, dtype) for j, n in enumerate(("q", "k"))}}
        for i in range(blocks)
    }
    return params, {f"h_{i}/attn": (HEADS,) for i in range(blocks)}


def stacked(blocks: int, dtype: str) -> tuple[Tree, Tree]:
    """One query and one key kernel, the blocks on axis 0."""
    shape = (blocks, WIDTH, HEADS, SIZE)
    params = {"h": {"attn": {n: _normal(j, shape, dtype) for j, n in enumerate(("q", "k"))}}}
    return params, {"h/attn": (blocks, HEADS)}


def fused(blocks: int, dtype: str) -> tuple[Tree, Tree]:
    """GPT-2's own: one kernel for queries, keys and values, an output projection beside it."""
    params = {
        f"h_{i}": {
            "attn": {
                "c_attn": {"kernel": _normal(i, (WIDTH, 3 * WIDTH), dtype)},
                "c_proj": {"kernel": _normal(i, (WIDTH, WIDTH), dtype)},
            }
        }
        for i in range(blocks)
    }
    return params, {f"h_{i}/attn": (HEADS,) for i in range(blocks)}


TREES: dict[str, Callable[[int, str], tuple[Tree, Tree]]] = {
    "a leaf a layer": per_layer,
    "stacked layers": stacked,
    "fused q k v": fused,
}


def maxima_of(shapes: Tree) -> dict[str, Tree]:
    """Maxima with all heads, the first head alone, and no head over the threshold."""
    low = {path: jnp.full(shape, THRESHOLD / 2) for path, shape in shapes.items()}
    # Little over the threshold: weights shrink by a factor that thousands of runs do not notice.
    high = {path: jnp.full(shape, THRESHOLD * 1.0001) for path, shape in shapes.items()}
    first = next(iter(low))
    one = {**low, first: low[first].at[(0,) * low[first].ndim].set(THRESHOLD * 1.0001)}
    return {"all heads": high, "one head": one, "no head": low}


def scaled_columns(path: Any, x: Any) -> int:
    """How many of a kernel's columns hold queries or keys."""
    name = jax.tree_util.keystr(path)
    return 0 if "c_proj" in name else 2 * WIDTH if "c_attn" in name else x.shape[-1]


def bytes_scaled(params: Tree) -> int:
    """Bytes of queries and keys."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(x.nbytes * scaled_columns(path, x) // x.shape[-1] for path, x in leaves)


def queries_and_keys(tree: Tree) -> list[jax.Array]:
    """Copies of what a clip multiplies, in arrays of their own."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    columns = [(x, scaled_columns(path, x)) for path, x in leaves]
    return [jnp.array(x[..., :count], copy=True) for x, count in columns if count]


class Held:
    """A tree that every contender takes over from the one before and hands on."""

    def __init__(self, tree: Any):
        self.tree = tree

    def through(self, step: Callable[[Any], Any]) -> Callable[[], Any]:
        """Returns a run of `step`, which may take its argument's memory for its result."""

        def run() -> Any:
            self.tree = step(self.tree)
            return self.tree

        return run


def check(params: Tree, maxima: dict[str, Tree]) -> None:
    """Compares the clip with NumPy in float64 on the first block."""
    for kind, factor in (("all heads", 1 / 1.0001), ("no head", 1.0)):
        new, info = apply_qk_clip(params, maxima[kind], threshold=THRESHOLD)
        assert int(info.total_clipped) == (info.total_heads if kind == "all heads" else 0)
        for (path, x), y in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(new), strict=True
        ):
            root = np.full(x.shape, factor**0.5)
            name = jax.tree_util.keystr(path)
            if "c_proj" in name:
                root[...] = 1.0
            elif "c_attn" in name:
                root[..., 2 * WIDTH :] = 1.0
            expected = np.asarray(x).astype(np.float64) * root
            bound = float(jnp.finfo(x.dtype).eps) * np.abs(expected)
            assert (np.abs(np.asarray(y).astype(np.float64) - expected) <= bound).all(), name


def contenders_of(what: str, params: Tree, shapes: Tree) -> dict[str, Callable[[], Any]]:
    """Returns the yardstick, and one run for each of the maxima, all of those on one tree."""
    if what == CLIP:
        alone, held = Held(queries_and_keys(params)), Held(params)
        once = jax.jit(lambda tree: [x * FACTOR for x in tree], donate_argnums=0)

        def clip(maxima: Tree, tree: Tree) -> Tree:
            return apply_qk_clip(tree, maxima, threshold=THRESHOLD)[0]

        clipping = jax.jit(clip, donate_argnums=1)
        return {YARDSTICK: alone.through(once)} | {
            kind: held.through(functools.partial(clipping, maxima))
            for kind, maxima in maxima_of(shapes).items()
        }

    # Updates far below the parameters, so that thousands of runs change their sum little.
    held = Held(jax.tree.map(lambda p: p * 2**-7, params))
    alone, beside = Held(queries_and_keys(held.tree)), queries_and_keys(params)
    tx = qk_clip(THRESHOLD)
    moving = jax.jit(
        lambda tree, params: [(p + u) * FACTOR - p for u, p in zip(tree, params, strict=True)],
        donate_argnums=0,
    )

    def clip_updates(maxima: Tree, updates: Tree, params: Tree) -> Any:
        return tx.update(updates, optax.EmptyState(), params, max_logits=maxima)[0]

    clipping = jax.jit(clip_updates, donate_argnums=1)

    def run(maxima: Tree) -> Callable[[], Tree]:
        return held.through(lambda updates: clipping(maxima, updates, params))

    return {YARDSTICK: alone.through(lambda tree: moving(tree, beside))} | {
        kind: run(maxima) for kind, maxima in maxima_of(shapes).items()
    }


def measure(what: str, name: str, blocks: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Times the function or the transformation on one tree."""
    params, shapes = TREES[name](1, dtype)
    check(params, maxima_of(shapes))
    params, shapes = TREES[name](blocks, dtype)
    size = bytes_scaled(params)
    contenders = contenders_of(what, params, shapes)
    del params
    seconds = interleave(contenders, rounds, warmup=2)
    return {
        "what": what,
        "tree": name,
        "dtype": dtype,
        "blocks": blocks,
        "bytes": size,
        "over_yardstick": {
            kind: ratio(times, seconds[YARDSTICK])
            for kind, times in seconds.items()
            if kind != YARDSTICK
        },
    }


def main() -> None:
    """Measures, prints and stores."""
    made = parser(__doc__, "clip_cost")
    made.add_argument("--blocks", type=int, default=BLOCKS)
    made.add_argument("--trees", nargs="+", default=list(TREES), choices=list(TREES))
    made.add_argument("--what", nargs="+", default=[CLIP, TRANSFORMATION])
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    made.set_defaults(rounds=25)
    options = made.parse_args()
    blocks = 2 if options.smoke else options.blocks
    rows = []
    for what, dtype, name in itertools.product(options.what, options.dtypes, options.trees):
        row = measure(what, name, blocks, dtype, 2 if options.smoke else options.rounds)
        rows.append(row)
        shown = {kind: round(r["median"], 3) for kind, r in row["over_yardstick"].items()}
        print(f"{what}, {name}, {dtype}, over {YARDSTICK}: {shown}", flush=True)
    store("clip_cost", {"width": WIDTH, "heads": HEADS, "head_dim": SIZE, "rows": rows}, options)


if __name__ == "__main__":
    main()
