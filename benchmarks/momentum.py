"""Saves the momentum of a training run: the matrices that `scale_by_muon` really sees.

    python benchmarks/momentum.py                 about a minute; writes runs/bench/momentum.npz

Trains the model of the examples with MuonClip and saves the momentum of all its matrices early, in
the middle and late. Every query head has its own key head, so that all of attention is square.
Names are "step/path/part/index"; the file is made again, never committed.
"""

import argparse
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

#: Multiples of `Settings.score_every`.
MOMENTS = (20, 100, 300)


def momentum_matrices(optimizer_state: Any) -> dict[str, np.ndarray]:
    """Returns the matrices `(in, out)` of all momenta in an optimizer's state, by name."""
    leaves = jax.tree.leaves(optimizer_state, is_leaf=lambda x: isinstance(x, mc.MuonState))
    found: dict[str, np.ndarray] = {}
    for state in leaves:
        if not isinstance(state, mc.MuonState):
            continue
        for path, leaf, spec in resolve_muon_specs(state.mu, None, None):
            parts = to_matrices(leaf, plan_leaf(leaf.shape, spec))
            for part, stack in enumerate(parts):
                found |= {f"{path}/{part}/{i}": np.asarray(x) for i, x in enumerate(stack)}
    return found


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/momentum.npz"))
    parser.add_argument("--smoke", action="store_true", help="a narrow model and ten steps")
    options = parser.parse_args()
    settings = Settings(score_windows=4, model=ModelConfig(key_heads=4))
    moments = MOMENTS
    if options.smoke:
        model = ModelConfig(layers=1, width=16, key_heads=4, hidden=32)
        settings = replace(settings, batch_size=2, length=16, model=model)
        moments = (10,)
    # The schedule is that of the whole run, which ends at the last moment that is saved.
    saved: dict[str, Any] = {}
    training = Training(settings, load_corpus())
    for state, _ in training.run(training.init()):
        step = int(state.step)
        if step in moments:
            matrices = momentum_matrices(state.optimizer)
            saved |= {f"{step}/{name}": matrix for name, matrix in matrices.items()}
            print(f"step {step}: {len(matrices)} matrices", flush=True)
        if step >= max(moments):
            break
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.out, **saved)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
