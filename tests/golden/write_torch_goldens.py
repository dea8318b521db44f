"""Writes `torch_muon.npz`: what `torch.optim.Muon` does on the problem of `torch_cases`.

Run from the root of the repository, with a Python that has torch:

    python -m tests.golden.write_torch_goldens

The tests need torch only for the live comparison; everywhere else they read the file.
"""

# torch is no dependency of this project, so the type checker may not find it.
# pyright: reportMissingImports=false

import contextlib
from unittest import mock

import numpy as np
import torch

from tests.golden.torch_cases import (
    CASES,
    GOLDENS,
    LEARNING_RATE,
    MOMENTUM,
    SHAPES,
    STEPS,
    WEIGHT_DECAY,
    Case,
    problem,
)


def without_bfloat16() -> contextlib.AbstractContextManager[object]:
    """Takes torch's cast to bfloat16 out of Newton-Schulz.

    `torch.optim.Muon` casts with `grad.bfloat16()` and then divides the result in place. Without
    Nesterov momentum that argument *is* the momentum buffer, so the cast is replaced by a copy and
    not by the identity, which would let the division change the buffer.
    """
    return mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)


def trajectory(case: Case) -> list[dict[str, np.ndarray]]:
    """Returns the parameters after every step, by name."""
    first, gradients = problem()
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in first.items()}
    optimizer = torch.optim.Muon(
        params.values(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        nesterov=case.nesterov,
        adjust_lr_fn=case.adjust_lr_fn,
    )
    steps = []
    for gradient in gradients:
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        with contextlib.nullcontext() if case.as_shipped else without_bfloat16():
            optimizer.step()
        steps.append({name: param.detach().numpy().copy() for name, param in params.items()})
    return steps


def main() -> None:
    """Computes every case and writes the file."""
    torch.set_num_threads(1)
    first, gradients = problem()
    arrays = {"torch_version": np.array(torch.__version__)}
    for name in SHAPES:
        arrays[f"params/{name}"] = first[name]
        arrays[f"gradients/{name}"] = np.stack([gradient[name] for gradient in gradients])
    for case in CASES:
        steps = trajectory(case)
        assert len(steps) == STEPS
        for name in SHAPES:
            arrays[f"{case.key}/{name}"] = np.stack([step[name] for step in steps])
    np.savez_compressed(GOLDENS, allow_pickle=False, **arrays)
    print(f"{GOLDENS.name}: {len(CASES)} cases, torch {torch.__version__}")


if __name__ == "__main__":
    main()
