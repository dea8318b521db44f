"""The maxima and factors of a clip, with a fixed structure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muonclip_jax.attention.maxima import finite_max


class QKClipInfo(NamedTuple):
    """The maxima and factors of a clip. A pytree whose structure depends only on shapes.

    Attributes:
        max_logits: Block -> largest logit of each head, `(*stack, heads)`, float32 or
            wider.
        gamma: Block -> factor of each head's logits, 1 for heads that were not clipped.
        clipped_heads: Block -> number of heads with a factor below 1, over all its layers.
    """

    max_logits: dict[str, Float[Array, "..."]]
    gamma: dict[str, Float[Array, "..."]]
    clipped_heads: dict[str, Int[Array, ""]]

    @property
    def largest(self) -> Float[Array, ""]:
        """The largest finite logit of all heads; -inf for a model without attention.

        NaN and infinite maxima are ignored unless there are no others.
        """
        parts = [finite_max(x, range(x.ndim)) for x in self.max_logits.values()]
        return finite_max(jnp.stack(parts), (0,)) if parts else jnp.asarray(-jnp.inf, jnp.float32)

    @property
    def total_clipped(self) -> Int[Array, ""]:
        """Number of clipped heads in all blocks."""
        return sum(self.clipped_heads.values(), start=jnp.zeros((), jnp.int32))

    @property
    def total_heads(self) -> int:
        """Number of heads, clipped or not."""
        return sum(gamma.size for gamma in self.gamma.values())

    def scalars(self, prefix: str = "qk_clip", *, blocks: bool = True) -> dict[str, jax.Array]:
        """Returns flat scalars for TensorBoard, Weights & Biases or a JSON line, as arrays.

        Args:
            prefix: First part of every name.
            blocks: Whether to add the values of each block.

        Returns:
            "prefix/max_logit", "prefix/min_gamma", "prefix/clipped_heads",
            "prefix/clipped_fraction", and with `blocks` the first three for
            "prefix/path/of/block/...".

        Example:
            >>> import jax.numpy as jnp
            >>> info = QKClipInfo(
            ...     max_logits={"attn": jnp.asarray([150.0, 90.0])},
            ...     gamma={"attn": jnp.asarray([2 / 3, 1.0])},
            ...     clipped_heads={"attn": jnp.asarray(1)},
            ... )
            >>> sorted(info.scalars(blocks=False))[:2]
            ['qk_clip/clipped_fraction', 'qk_clip/clipped_heads']
        """
        clipped, smallest = self.total_clipped, [gamma.min() for gamma in self.gamma.values()]
        flat = {
            f"{prefix}/max_logit": self.largest,
            f"{prefix}/min_gamma": jnp.stack(smallest).min() if smallest else jnp.ones(()),
            f"{prefix}/clipped_heads": clipped,
            f"{prefix}/clipped_fraction": clipped / max(self.total_heads, 1),
        }
        for path in self.gamma if blocks else ():
            name = f"{prefix}/{path}" if path else prefix + "/block"
            largest = self.max_logits[path]
            flat[f"{name}/max_logit"] = finite_max(largest, range(largest.ndim))
            flat[f"{name}/min_gamma"] = self.gamma[path].min()
            flat[f"{name}/clipped_heads"] = self.clipped_heads[path]
        return flat
