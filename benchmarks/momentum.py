"""The momentum of a training run: the matrices that `scale_by_muon` really sees.

Trains the model of the examples with MuonClip, about a minute. Every query head has its own key
head, so that all of attention is square.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import jax
import numpy as np
from common.data import load_corpus
from common.model import ModelConfig
from common.training import Settings, Training

import muonclip_jax as mc
from muonclip_jax.matrices import plan_leaf
from muonclip_jax.matrices.parts import to_matrices
from muonclip_jax.routing import resolve_muon_specs

#: Early, in the middle and late; multiples of `Settings.score_every`.
MOMENTS = (20, 100, 300)


def momentum_by_shape(*, smoke: bool) -> dict[tuple[int, int], np.ndarray]:
    """Trains, and returns stacks `(count, rows, columns)` of wide matrices by shape."""
    settings = Settings(score_windows=4, model=ModelConfig(key_heads=4))
    moments = MOMENTS
    if smoke:
        model = ModelConfig(layers=1, width=16, key_heads=4, hidden=32)
        settings = replace(settings, batch_size=2, length=16, model=model)
        moments = (10,)
    # The schedule is that of the whole run, which ends at the last moment that is kept.
    groups: dict[tuple[int, int], list[np.ndarray]] = {}
    training = Training(settings, load_corpus())
    for state, _ in training.run(training.init()):
        if int(state.step) in moments:
            for x in momentum_matrices(state.optimizer):
                wide = x if x.shape[0] <= x.shape[1] else x.T
                groups.setdefault((wide.shape[0], wide.shape[1]), []).append(wide)
        if state.step >= max(moments):
            break
    return {shape: np.stack(found) for shape, found in groups.items()}


def momentum_matrices(optimizer_state: Any) -> list[np.ndarray]:
    """Returns the matrices `(in, out)` of all momenta in an optimizer's state."""
    leaves = jax.tree.leaves(optimizer_state, is_leaf=lambda x: isinstance(x, mc.MuonState))
    return [
        np.asarray(x, np.float64)
        for state in leaves
        if isinstance(state, mc.MuonState)
        for _, leaf, spec in resolve_muon_specs(state.mu, None, None)
        for stack in to_matrices(leaf, plan_leaf(leaf.shape, spec))
        for x in stack
    ]
