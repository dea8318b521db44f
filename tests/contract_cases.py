"""The transformations that keep the contract of `test_contract.py`, one row each.

A new transformation is a new row; every promise is then asked of it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc

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


@dataclass(frozen=True)
class Row:
    """A transformation and what its update needs.

    Attributes:
        factory: The public function.
        traced: Hyperparameters that may be traced, with values off their defaults.
        static: Names of the others that `optax.inject_hyperparams` would take for numbers or
            schedules.
        shapes: The parameters' shapes.
        extra: Extra arguments of the update.
        leave_out: A leaf that the transformation can do without, under `masked` and
            `multi_transform`.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    traced: Mapping[str, float]
    shapes: Any
    leave_out: tuple[str, ...]
    static: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> optax.GradientTransformationExtraArgs:
        """Builds the transformation with the row's hyperparameters."""
        return self.factory(**self.traced)

    def extra_args(self) -> dict[str, Any]:
        """Returns the extra arguments as device arrays."""
        return jax.tree.map(jnp.asarray, dict(self.extra))

    def tree(self, seed: int, dtype: Any = jnp.float32) -> Any:
        """Returns normal numbers in the row's shapes."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
            self.shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def chosen(self, tree: Any) -> Any:
        """Returns the tree of whether a leaf stays under `masked` and `multi_transform`."""
        names = "/".join(self.leave_out)
        return jax.tree.map_with_path(
            lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/") != names, tree
        )


def accumulated_muonclip(
    learning_rate: Any, qk_clip_threshold: Any, param_shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Accumulation with a step on every call, so that what is asked of steps is asked of it."""
    return mc.accumulate(
        mc.muonclip(
            learning_rate, qk_clip_threshold=qk_clip_threshold, param_shardings=param_shardings
        ),
        every=1,
        max_logits=lambda params: {} if params == {} else MAX_LOGITS,
        should_skip_update_fn=optax.skip_not_finite,
        param_shardings=param_shardings,
    )


def measured_muonclip(
    learning_rate: Any, qk_clip_threshold: Any, param_shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
    """A sample on every call, so that what is asked of steps is asked of it."""
    return mc.metrics(
        mc.muonclip(
            learning_rate, qk_clip_threshold=qk_clip_threshold, param_shardings=param_shardings
        ),
        every=1,
        qk_clip_threshold=qk_clip_threshold,
        param_shardings=param_shardings,
    )


ROWS: dict[str, Row] = {
    "scale_by_muon": Row(
        factory=functools.partial(mc.scale_by_muon, "keller_jordan"),
        traced={"beta": 0.9, "eps": 1e-7},
        static=("ns_steps",),
        shapes=MATRICES,
        leave_out=("tall", "kernel"),
    ),
    "orthogonalize_updates": Row(
        factory=functools.partial(mc.orthogonalize_updates, ns_coeffs="keller_jordan"),
        traced={"eps": 1e-7},
        static=("ns_steps", "rules"),
        shapes=MATRICES,
        leave_out=("tall", "kernel"),
    ),
    "scale_by_neuron_rms": Row(
        factory=mc.scale_by_neuron_rms,
        traced={"b2": 0.8, "eps": 1e-3},
        shapes=MATRICES,
        leave_out=("tall", "kernel"),
    ),
    "hyperball": Row(
        factory=mc.hyperball,
        traced={"learning_rate": 0.1},
        shapes=MATRICES,
        leave_out=("tall", "kernel"),
    ),
    "add_weight_decay": Row(
        factory=functools.partial(mc.add_weight_decay, cautious=True),
        traced={"weight_decay": 0.1, "base_width": 4.0},
        shapes=MATRICES,
        leave_out=("tall", "kernel"),
    ),
    "scale_by_shape": Row(
        factory=mc.scale_by_shape,
        traced={"consistent_rms": 0.3},
        shapes=MATRICES,
        leave_out=("tall", "kernel"),
    ),
    "qk_clip": Row(
        factory=mc.qk_clip,
        traced={"threshold": 95.0, "alpha": 0.4},
        static=("blocks",),
        shapes=MODEL,
        extra={"max_logits": MAX_LOGITS},
        leave_out=("mlp", "kernel"),
    ),
    "muon": Row(
        factory=mc.muon,
        traced={"learning_rate": 0.02, "weight_decay": 0.1, "beta": 0.9, "adam_b2": 0.99},
        static=(
            "ns_steps",
            "weight_decay_mask",
            "mu_dtype",
            "muon_weight_dimension_numbers",
            "nesterov",
        ),
        shapes=MODEL,
        leave_out=("mlp", "kernel"),
    ),
    "muonclip": Row(
        factory=mc.muonclip,
        traced={
            "learning_rate": 0.02,
            "weight_decay": 0.05,
            "qk_clip_threshold": 95.0,
            "qk_clip_alpha": 0.4,
            "consistent_rms": 0.3,
            "adam_b1": 0.8,
        },
        static=("ns_steps", "weight_decay_mask", "qk_clip_blocks", "mu_dtype", "nesterov"),
        shapes=MODEL,
        extra={"max_logits": MAX_LOGITS},
        leave_out=("mlp", "kernel"),
    ),
    "accumulate": Row(
        factory=accumulated_muonclip,
        traced={"learning_rate": 0.02, "qk_clip_threshold": 95.0},
        shapes=MODEL,
        extra={"max_logits": MAX_LOGITS},
        leave_out=("mlp", "kernel"),
    ),
    "metrics": Row(
        factory=measured_muonclip,
        traced={"learning_rate": 0.02, "qk_clip_threshold": 95.0},
        shapes=MODEL,
        extra={"max_logits": MAX_LOGITS},
        leave_out=("mlp", "kernel"),
    ),
}
