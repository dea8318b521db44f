"""Writes `migration.npz`: what others' PyTorch code does on the problems of `migration_cases`.

Run from the root of the repository, with a Python that has torch, and with `muon.py` of
KellerJordan/Muon and `qk_clip.py` of axion66/efficient-muonclip in a folder on its path:

    PYTHONPATH=FOLDER python -m tests.golden.write_migration_goldens
"""

# Neither torch nor the two modules are dependencies, so the type checker may not find them.
# pyright: reportMissingImports=false

import re
from typing import Any
from unittest import mock

import numpy as np
import torch
from muon import SingleDeviceMuonWithAuxAdam
from qk_clip import QKClip

from tests.golden.migration_cases import (
    GOLDENS,
    GROUPS,
    HEADS,
    S_MAX,
    SHAPES,
    STEPS,
    TAU,
    attention,
    problem,
)


def trajectory() -> list[dict[str, np.ndarray]]:
    """Returns the parameters after every step of `SingleDeviceMuonWithAuxAdam`."""
    first, gradients = problem()
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in first.items()}
    groups = []
    for group in GROUPS.values():
        chosen = [params[name] for name in SHAPES if re.search(group["pattern"], name)]
        settings = {key: value for key, value in group.items() if key != "pattern"}
        groups.append({"params": chosen, **settings})
    assert sum(len(group["params"]) for group in groups) == len(SHAPES)
    optimizer = SingleDeviceMuonWithAuxAdam(groups)
    steps = []
    for gradient in gradients:
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        # In float32: its cast to bfloat16 becomes a copy.
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            optimizer.step()
        steps.append({name: param.detach().numpy().copy() for name, param in params.items()})
    return steps


def clipped(mode: str, metadata: dict[str, str]) -> list[dict[str, np.ndarray]]:
    """Returns the attention weights after one step of `QKClip`."""
    layers: list[Any] = []
    for weights in attention():
        layer = torch.nn.Module()
        for name, value in weights.items():
            setattr(layer, name, torch.nn.Parameter(torch.tensor(value)))
        layers.append(layer)
    s_max = [[torch.tensor(value) for value in heads] for heads in S_MAX]
    QKClip(layers, mode, metadata, n_head=HEADS, tau=TAU).step(s_max)
    return [
        {name: getattr(layer, name).detach().numpy().copy() for name in ("w_q", "w_k", "w_r")}
        for layer in layers
    ]


def main() -> None:
    """Computes every case and writes the file."""
    torch.set_num_threads(1)
    arrays = {"torch_version": np.array(torch.__version__)}
    steps = trajectory()
    assert len(steps) == STEPS
    for name in SHAPES:
        arrays[f"groups/{name}"] = np.stack([step[name] for step in steps])
    modes = {
        "mha": {"w_q": "w_q", "w_k": "w_k"},
        "mla": {"w_qc": "w_q", "w_kc": "w_k", "w_qr": "w_r"},
    }
    for mode, metadata in modes.items():
        for layer, weights in enumerate(clipped(mode, metadata)):
            arrays |= {f"{mode}/{layer}/{name}": value for name, value in weights.items()}
    np.savez_compressed(GOLDENS, allow_pickle=False, **arrays)
    print(f"{GOLDENS.name}: torch {torch.__version__}")


if __name__ == "__main__":
    main()
