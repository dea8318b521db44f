"""Fixed problems whose numbers by PyTorch code are kept in `torch_muon.npz` and `migration.npz`.

Nothing here needs torch, so that the tests can read the tables on machines without it. Matrices are
in torch's layout `(out, in)`; a Flax kernel `(in, out)` is their transpose.
"""

from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

TORCH, MIGRATION = (Path(__file__).with_name(f"{x}.npz") for x in ("torch_muon", "migration"))

#: Of `torch.optim.Muon`.
TORCH_SETTINGS = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
TORCH_SHAPES: dict[str, tuple[int, ...]] = {
    "square": (16, 16),
    "tall": (20, 12),
    "wide": (12, 20),
    "very_wide": (8, 32),
}
#: Name in the file -> the rule that scales the rate, whether with Nesterov momentum, and whether
#: with the cast to bfloat16 that torch makes before Newton-Schulz.
TORCH_CASES = {
    f"{rule}/{momentum}/{precision}": (rule, momentum == "nesterov", precision == "bfloat16")
    for rule in ("original", "match_rms_adamw")
    for momentum in ("nesterov", "plain")
    for precision in ("bfloat16", "float32")
}

#: Of `MuonWithAuxAdam`, by name. The convolution is `(out, in, height, width)`.
SHAPES: dict[str, tuple[int, ...]] = {
    "blocks/0/up": (20, 12),
    "blocks/0/down": (12, 20),
    "blocks/0/norm": (12,),
    "stages/0/conv": (8, 4, 3, 3),
    "embed": (30, 12),
    "head": (30, 12),
}
#: Its groups by name: which parameters, and the settings of each.
GROUPS: dict[str, dict[str, Any]] = {
    "blocks": {"pattern": r"^blocks/\d+/(up|down)", "use_muon": True}
    | {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1},
    "convolutions": {"pattern": "^stages/", "use_muon": True, "lr": 0.02, "momentum": 0.8},
    "head": {"pattern": "^head", "use_muon": False}
    | {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-10},
    "rest": {"pattern": "^embed|norm", "use_muon": False}
    | {"lr": 0.06, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05},
}

#: Of the attention layers that `QKClip` clips.
HEADS, HEAD_DIM, WIDTH = 4, 6, 10
TAU = 100.0
#: Largest logits of three layers, in the form that `QKClip.step` takes.
S_MAX = [[150.0, 90.0, 40.0, 300.0], [12.5, 100.1, 99.9, 0.5], [1e3, 11.2, 103.0, 0.1]]


def problem(library: str) -> tuple[Arrays, list[Arrays]]:
    """Returns the first parameters and the gradient of every step, float32 by name.

    Gradients are of very different sizes: no direction may depend on it, and momentum must.
    """
    shapes, seed, first = (
        (TORCH_SHAPES, 20240, 1e-3) if library == "torch" else (SHAPES, 20250, 1e-2)
    )
    rng = np.random.default_rng(seed)

    def normal(scale: float) -> Arrays:
        return {
            name: (scale * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    return normal(1.0), [normal(scale) for scale in (first, 1.0, 0.3)]


def attention() -> list[Arrays]:
    """Returns the query and key weights of three layers, `(heads * head_dim, width)`."""
    rng = np.random.default_rng(20251)
    shape = (HEADS * HEAD_DIM, WIDTH)
    return [
        {name: rng.standard_normal(shape).astype(np.float32) for name in ("w_q", "w_k", "w_r")}
        for _ in S_MAX
    ]
