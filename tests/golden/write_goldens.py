"""Writes `torch_muon.npz` and `migration.npz`: what PyTorch code of others does on fixed problems.

Run from the root of the repository, with a Python that has torch, and for the second file with
`muon.py` of KellerJordan/Muon and `qk_clip.py` of axion66/efficient-muonclip in a folder on its
path:

    python -m tests.golden.write_goldens
    PYTHONPATH=FOLDER python -m tests.golden.write_goldens --migration
"""

# Neither torch nor the two modules are dependencies, so the type checker may not find them.
# pyright: reportMissingImports=false

import contextlib
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.golden import cases
from tests.golden.cases import Arrays


def steps_of(
    build: Callable[[dict[str, Any]], Any], first: Arrays, gradients: list[Arrays], cast: bool
) -> list[Arrays]:
    """Returns the parameters after every step of an optimizer, by name.

    Without `cast` the cast to bfloat16 before Newton-Schulz becomes a copy, not the identity:
    without Nesterov momentum its argument is the momentum buffer, which is then divided in place.
    """
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in first.items()}
    optimizer, steps = build(params), []
    copies = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for gradient in gradients:
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        with contextlib.nullcontext() if cast else copies:
            optimizer.step()
        steps.append({name: param.detach().numpy().copy() for name, param in params.items()})
    return steps


def write_torch() -> None:
    first, gradients = cases.problem("torch")
    arrays = {"torch_version": np.array(torch.__version__)}
    for name in first:
        arrays[f"params/{name}"] = first[name]
        arrays[f"gradients/{name}"] = np.stack([gradient[name] for gradient in gradients])
    for key, (rule, nesterov, is_cast) in cases.TORCH_CASES.items():
        settings: Any = cases.TORCH_SETTINGS | {"nesterov": nesterov, "adjust_lr_fn": rule}
        steps = steps_of(
            lambda params, settings=settings: torch.optim.Muon(params.values(), **settings),
            first,
            gradients,
            cast=is_cast,
        )
        for name in first:
            arrays[f"{key}/{name}"] = np.stack([step[name] for step in steps])
    np.savez_compressed(cases.TORCH, allow_pickle=False, **arrays)


def with_aux_adam(params: dict[str, Any]) -> Any:
    """Returns `SingleDeviceMuonWithAuxAdam` with the groups of the case."""
    from muon import SingleDeviceMuonWithAuxAdam

    groups = []
    for group in cases.GROUPS.values():
        settings = {key: value for key, value in group.items() if key != "pattern"}
        chosen = [param for name, param in params.items() if re.search(group["pattern"], name)]
        groups.append({"params": chosen, **settings})
    return SingleDeviceMuonWithAuxAdam(groups)


def clipped(mode: str, metadata: dict[str, str]) -> list[Any]:
    """Returns the attention layers after one step of `QKClip`."""
    from qk_clip import QKClip

    layers: list[Any] = []
    for weights in cases.attention():
        layer = torch.nn.Module()
        for name, value in weights.items():
            setattr(layer, name, torch.nn.Parameter(torch.tensor(value)))
        layers.append(layer)
    s_max = [[torch.tensor(value) for value in heads] for heads in cases.S_MAX]
    settings = {"n_head": cases.HEADS, "tau": cases.TAU}
    QKClip(layers, mode, metadata, **settings).step(s_max)
    return layers


def write_migration() -> None:
    arrays = {"torch_version": np.array(torch.__version__)}
    steps = steps_of(with_aux_adam, *cases.problem("migration"), cast=False)
    for name in cases.SHAPES:
        arrays[f"groups/{name}"] = np.stack([step[name] for step in steps])
    modes = {
        "mha": {"w_q": "w_q", "w_k": "w_k"},
        "mla": {"w_qc": "w_q", "w_kc": "w_k", "w_qr": "w_r"},
    }
    for mode, metadata in modes.items():
        for number, layer in enumerate(clipped(mode, metadata)):
            for name in ("w_q", "w_k", "w_r"):
                arrays[f"{mode}/{number}/{name}"] = getattr(layer, name).detach().numpy()
    np.savez_compressed(cases.MIGRATION, allow_pickle=False, **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_migration() if "--migration" in sys.argv else write_torch()
