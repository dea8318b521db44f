"""The fixed problem whose `torch.optim.Muon` trajectories are kept in `torch_muon.npz`.

Nothing here needs torch, so that the tests can read the table on machines without it. Matrices are
in torch's layout `(out, in)`; a Flax kernel `(in, out)` is their transpose.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDENS = Path(__file__).with_name("torch_muon.npz")

MOMENTUM = 0.95
WEIGHT_DECAY = 0.1
LEARNING_RATE = 0.1

#: Torch's `(out, in)` shapes by name.
SHAPES = {"square": (16, 16), "tall": (20, 12), "wide": (12, 20), "very_wide": (8, 32)}


class Case(NamedTuple):
    """One trajectory: which rule scales the rate, which momentum, and which precision."""

    adjust_lr_fn: str
    nesterov: bool
    as_shipped: bool
    """With the cast to bfloat16 that torch makes before Newton-Schulz, or without it."""

    @property
    def key(self) -> str:
        """The case's name in the file."""
        momentum = "nesterov" if self.nesterov else "plain"
        precision = "bfloat16" if self.as_shipped else "float32"
        return f"{self.adjust_lr_fn}/{momentum}/{precision}"


CASES = [
    Case(*choice)
    for choice in itertools.product(("original", "match_rms_adamw"), (True, False), (True, False))
]


Arrays = dict[str, np.ndarray]


def draw(
    shapes: dict[str, tuple[int, ...]], seed: int, scales: tuple[float, ...]
) -> tuple[Arrays, list[Arrays]]:
    """Returns the first parameters and the gradient of every step, float32 by name."""
    rng = np.random.default_rng(seed)

    def normal(scale: float) -> Arrays:
        return {
            name: (scale * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    return normal(1.0), [normal(scale) for scale in scales]


def problem() -> tuple[Arrays, list[Arrays]]:
    """Gradients are of very different sizes: no direction may depend on it, and momentum must."""
    return draw(SHAPES, 20240, (1e-3, 1.0, 0.3))
