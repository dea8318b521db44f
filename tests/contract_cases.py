"""The transformations that keep the contract of `test_contract.py`, one row each.

A new transformation is a new row; every promise is then asked of it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc
from tests.helpers import normal_tree

#: Every axis divides over a mesh of 4 x 2 or is left whole; "row" is a matrix of one row.
MATRICES = {
    "wide": {"kernel": (8, 16)},
    "tall": {"kernel": (16, 8)},
    "other": {"kernel": (8, 16)},
    "row": {"kernel": (1, 8)},
}
MODEL = {
    "attention": {
        "query": {"kernel": (8, 4, 4), "bias": (4, 4)},
        "key": {"kernel": (8, 4, 4), "bias": (4, 4)},
        "value": {"kernel": (8, 4, 4), "bias": (4, 4)},
        "out": {"kernel": (4, 4, 8), "bias": (8,)},
    },
    "mlp": {"kernel": (8, 16), "bias": (16,)},
    "row": {"kernel": (1, 8)},
    "norm": {"scale": (8,)},
}
#: Three heads of four are over the thresholds in use, one is not.
MAX_LOGITS = {"attention": np.array([150.0, 90.0, 400.0, 101.0], np.float32)}


@dataclass(frozen=True, eq=False)
class Row:
    """A transformation, hyperparameters that may be traced, and what its update needs."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    traced: dict[str, float]
    shapes: Any
    #: Whether the update takes maxima.
    clips: bool = False
    #: The hyperparameters that `optax.inject_hyperparams` would take for numbers or schedules.
    static: tuple[str, ...] = ()

    def make(self) -> optax.GradientTransformationExtraArgs:
        return self.factory(**self.traced)

    def extra_args(self) -> dict[str, Any]:
        return {"max_logits": jax.tree.map(jnp.asarray, MAX_LOGITS)} if self.clips else {}

    def tree(self, seed: int, dtype: Any = jnp.float32) -> Any:
        return normal_tree(self.shapes, seed, dtype)

    def chosen(self, tree: Any) -> Any:
        """Which leaves stay under `masked` and `multi_transform`."""
        return {
            name: jax.tree.map(lambda _, name=name: name not in ("tall", "mlp"), leaves)
            for name, leaves in tree.items()
        }


def wrapped(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """A muonclip in `accumulate` or `metrics`, which take a step or a sample on every call."""

    def make(
        learning_rate: Any, qk_clip_threshold: Any, param_shardings: Any = None
    ) -> optax.GradientTransformationExtraArgs:
        inner = mc.muonclip(
            learning_rate, qk_clip_threshold=qk_clip_threshold, param_shardings=param_shardings
        )
        options: dict[str, Any] = {"every": 1, "param_shardings": param_shardings}
        if wrap is mc.metrics:
            return wrap(inner, qk_clip_threshold=qk_clip_threshold, **options)
        return wrap(
            inner,
            max_logits=lambda params: {} if params == {} else MAX_LOGITS,
            should_skip_update_fn=optax.skip_not_finite,
            **options,
        )

    return make


CLIP = {"learning_rate": 0.02, "qk_clip_threshold": 95.0}
ROWS: dict[str, Row] = {
    "scale_by_muon": Row(
        functools.partial(mc.scale_by_muon, "keller_jordan"),
        {"beta": 0.9, "eps": 1e-7},
        MATRICES,
        static=("ns_steps",),
    ),
    "orthogonalize_updates": Row(
        functools.partial(mc.orthogonalize_updates, ns_coeffs="keller_jordan"),
        {"eps": 1e-7},
        MATRICES,
        static=("ns_steps", "rules"),
    ),
    "scale_by_neuron_rms": Row(mc.scale_by_neuron_rms, {"b2": 0.8, "eps": 1e-3}, MATRICES),
    "hyperball": Row(mc.hyperball, {"learning_rate": 0.1}, MATRICES),
    "add_weight_decay": Row(
        functools.partial(mc.add_weight_decay, cautious=True),
        {"weight_decay": 0.1, "base_width": 4.0},
        MATRICES,
    ),
    "scale_by_shape": Row(mc.scale_by_shape, {"consistent_rms": 0.3}, MATRICES),
    "qk_clip": Row(
        mc.qk_clip, {"threshold": 95.0, "alpha": 0.4}, MODEL, clips=True, static=("blocks",)
    ),
    "muon": Row(
        mc.muon,
        {"learning_rate": 0.02, "weight_decay": 0.1, "beta": 0.9, "adam_b2": 0.99},
        MODEL,
        static=(
            "ns_steps",
            "weight_decay_mask",
            "mu_dtype",
            "muon_weight_dimension_numbers",
            "nesterov",
        ),
    ),
    "muonclip": Row(
        mc.muonclip,
        {
            **CLIP,
            "weight_decay": 0.05,
            "qk_clip_alpha": 0.4,
            "beta": 0.9,
            "consistent_rms": 0.3,
            "eps": 1e-7,
            "adam_learning_rate": 0.004,
            "adam_b1": 0.8,
            "adam_b2": 0.9,
            "adam_eps": 1e-2,
            "adam_weight_decay": 0.02,
        },
        MODEL,
        clips=True,
        static=("ns_steps", "weight_decay_mask", "qk_clip_blocks", "mu_dtype", "nesterov"),
    ),
    "accumulate": Row(wrapped(mc.accumulate), CLIP, MODEL, clips=True),
    "metrics": Row(wrapped(mc.metrics), CLIP, MODEL, clips=True),
}
