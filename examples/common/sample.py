"""Text from a trained model, byte by byte, the same for the same key."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def sample(
    model: nn.Module,
    params: Any,
    *,
    prompt: str,
    count: int,
    length: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> str:
    """Continues a prompt.

    Args:
        model: The language model.
        params: Its parameters.
        prompt: What to go on from; the last `length` bytes count.
        count: How many bytes to add.
        length: How many bytes the model was trained to see; the window slides after that.
        temperature: Below 1 prefers likely bytes.
        seed: The sample's key.

    Returns:
        The prompt and its continuation.
    """
    start = np.frombuffer(prompt.encode(), np.uint8)[-length:]
    if len(start) == 0:
        raise ValueError("The prompt is empty; write one byte at least, such as a newline.")
    window = jnp.zeros(length, jnp.uint8).at[: len(start)].set(start)
    keys = jax.random.split(jax.random.key(seed), count)
    continued = _continue(model, params, window, jnp.int32(len(start)), keys, temperature)
    return prompt + np.asarray(continued).tobytes().decode(errors="replace")


@partial(jax.jit, static_argnums=0)
def _continue(
    model: nn.Module,
    params: Any,
    window: Array,
    known: Int[Array, ""],
    keys: Array,
    temperature: float,
) -> Array:
    """Scans over keys: one byte each. Attention is causal, so that what follows is not seen."""

    def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        window, known = carry
        logits = jnp.asarray(model.apply({"params": params}, window[None]))
        byte = jax.random.categorical(key, logits[0, known - 1] / temperature).astype(jnp.uint8)
        full = known == window.size
        window = jnp.where(full, jnp.roll(window, -1), window)
        window = window.at[jnp.where(full, window.size - 1, known)].set(byte)
        return (window, jnp.where(full, known, known + 1)), byte

    return jax.lax.scan(step, (window, known), keys)[1]
