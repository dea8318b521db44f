"""Fixed problems whose numbers by other PyTorch code are kept in `migration.npz`.

Nothing here needs torch. Matrices are in its layout `(out, in)`; a Flax kernel is the transpose.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.torch_cases import Arrays, draw

GOLDENS = Path(__file__).with_name("migration.npz")

#: Torch's shapes by name. The convolution is `(out, in, height, width)`.
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks/0/up": (20, 12),
    "blocks/0/down": (12, 20),
    "blocks/0/norm": (12,),
    "stages/0/conv": (8, 4, 3, 3),
    "embed": (30, 12),
    "head": (30, 12),
}

#: Groups of `MuonWithAuxAdam` by name: which parameters, and the settings of each.
GROUPS: dict[str, dict[str, Any]] = {
    "blocks": {"pattern": r"^blocks/\d+/(up|down)", "use_muon": True}
    | {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1},
    "convolutions": {"pattern": "^stages/", "use_muon": True, "lr": 0.02, "momentum": 0.8},
    "head": {"pattern": "^head", "use_muon": False}
    | {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-10},
    "rest": {"pattern": "^embed|norm", "use_muon": False}
    | {"lr": 0.06, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05},
}

#: Of the attention layers that are clipped.
HEADS, HEAD_DIM, WIDTH = 4, 6, 10
TAU = 100.0
#: Largest logits of three layers, in the form that `QKClip.step` takes.
S_MAX = [[150.0, 90.0, 40.0, 300.0], [12.5, 100.1, 99.9, 0.5], [1e3, 11.2, 103.0, 0.1]]


def problem() -> tuple[Arrays, list[Arrays]]:
    """Returns the first parameters and the gradients of all steps, float32 by name."""
    return draw(SHAPES, 20250, (1e-2, 1.0, 0.3))


def attention() -> list[dict[str, np.ndarray]]:
    """Returns the query and key weights of three layers, `(heads * head_dim, width)`."""
    rng = np.random.default_rng(20251)
    shape = (HEADS * HEAD_DIM, WIDTH)
    return [
        {name: rng.standard_normal(shape).astype(np.float32) for name in ("w_q", "w_k", "w_r")}
        for _ in S_MAX
    ]
