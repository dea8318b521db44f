"""What the Pallas kernels for per-head maxima are asked for, and how they run without a device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax.kernels.max_logits import pallas, pallas_tpu
from muonclip_jax.kernels.max_logits.pallas import Kernel
from muonclip_jax.kernels.pairs import Geometry

#: The platforms that have a kernel.
PLATFORMS = tuple(pallas.KERNELS)


class Case(NamedTuple):
    """Sizes of queries and keys, and which arrays hide pairs."""

    queries: int
    keys: int
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    geometry: Geometry = Geometry()
    mask: str = ""
    lengths: tuple[tuple[int, int], tuple[int, int]] | None = None

    def arrays(self) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Draws query, key and keywords of `attention_max_logits`, always the same ones."""
        rng = np.random.default_rng(0)
        query = rng.standard_normal((2, self.queries, self.heads, self.head_dim))
        key = rng.standard_normal((2, self.keys, self.key_heads, self.head_dim))
        keywords: dict[str, Any] = {
            "is_causal": self.geometry.is_causal,
            "local_window_size": self.geometry.local_window_size,
        }
        shape = {
            "pairs": (2, self.heads, self.queries, self.keys),
            "pairs, all heads": (1, 1, self.queries, self.keys),
            "keys": (2, 1, 1, self.keys),
            "queries": (1, self.heads, self.queries, 1),
        }.get(self.mask)
        if shape is not None:
            mask = rng.random(shape) < 0.3
            mask[:, :, : shape[2] // 3] &= shape[2] == 1  # the first queries see nothing
            keywords["mask"] = jnp.asarray(mask)
        if self.lengths is not None:
            keywords["query_seq_lengths"] = jnp.asarray(self.lengths[0], jnp.int32)
            keywords["key_value_seq_lengths"] = jnp.asarray(self.lengths[1], jnp.int32)
        return jnp.asarray(query, self.dtype), jnp.asarray(key, self.dtype), keywords


CAUSAL = Geometry(is_causal=True)

#: Several blocks of queries and keys each, the last ones not full.
CASES: dict[str, Case] = {
    "plain": Case(300, 200),
    "causal, grouped": Case(300, 300, dtype="bfloat16", geometry=CAUSAL),
    "causal, one key head": Case(150, 333, key_heads=1, head_dim=128, geometry=CAUSAL),
    "causal window": Case(
        300, 300, dtype="bfloat16", head_dim=128, geometry=Geometry(True, (40, 0))
    ),
    "window": Case(333, 200, key_heads=4, head_dim=8, geometry=Geometry(False, (3, 90))),
    "head of no power of two": Case(200, 200, head_dim=72, geometry=CAUSAL),
    "mask": Case(200, 300, mask="pairs"),
    "mask for all heads, causal": Case(300, 300, mask="pairs, all heads", geometry=CAUSAL),
    "mask of keys": Case(200, 300, mask="keys"),
    "mask of queries": Case(200, 300, mask="queries", lengths=((200, 150), (7, 300))),
    "ragged": Case(300, 300, geometry=CAUSAL, lengths=((300, 9), (180, 0))),
    "float16": Case(200, 200, dtype="float16"),
}
#: The cases that stand for the others in a quick run.
QUICK = ("causal window", "mask of queries", "ragged")


@pytest.fixture(params=PLATFORMS)
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives CPUs a platform's kernel, interpreted, and blocks so small that there are several."""
    monkeypatch.setattr(pallas_tpu, "_BLOCK", 128)
    monkeypatch.setattr(pallas_tpu, "_CHUNK_BYTES", 128 * 1024)
    kernel = pallas.KERNELS[request.param]
    launch = functools.partial(kernel.launch, interpret=True)
    # XLA's partitioner for CPUs does what the one for GPUs does.
    monkeypatch.setitem(pallas.KERNELS, "cpu", Kernel(launch, kernel.refusal, is_partitioned=True))
    return request.param
