"""`torch.optim.Muon` and its relatives on the tree that JAX's optimizers get.

torch casts to bfloat16 inside Newton-Schulz and has no option against it. The float32 contender is
torch's own function, compiled from torch's own source with that one cast taken out, so that
everything else is what torch ships. Relatives (a compiled Newton-Schulz, other people's kernels)
take the place of the same function, so that momentum, scaling and update stay torch's.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.harness import cores

# Not by `import`: types are checked where torch is not installed, too.
torch: Any = importlib.import_module("torch")
torch_source: Any = importlib.import_module("torch.optim._muon")

NewtonSchulz = Callable[..., Any]
STOCK: NewtonSchulz = torch_source._zeropower_via_newtonschulz
_CAST = "grad.bfloat16()"


def _without_cast() -> NewtonSchulz:
    """Returns torch's Newton-Schulz in the dtype of its input."""
    text = inspect.getsource(STOCK)
    if text.count(_CAST) != 1:
        raise RuntimeError(f"torch {torch.__version__} no longer casts by {_CAST}; look again.")
    scope = dict(vars(torch_source))
    exec(text.replace(_CAST, "grad.clone()"), scope)
    return scope[STOCK.__name__]


FLOAT32 = _without_cast()


def device() -> str:
    """Returns where torch computes: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def newton_schulz_functions() -> dict[str, NewtonSchulz]:
    """Returns what stands in for torch's Newton-Schulz, by name; all that can run here."""
    functions = {"torch.optim.Muon, float32": FLOAT32, "torch.optim.Muon, bfloat16": STOCK}
    if device() == "cuda":
        functions["torch.optim.Muon, torch.compile"] = torch.compile(STOCK)
        if importlib.util.find_spec("gram_newton_schulz"):
            gram_newton_schulz: Any = importlib.import_module("gram_newton_schulz")
            kernels = bool(importlib.util.find_spec("quack"))
            gram = gram_newton_schulz.GramNewtonSchulz(ns_use_kernels=kernels)
            name = "gram-newton-schulz" + ("" if kernels else " without its kernels")
            functions[name] = lambda grad, *_: gram(grad)
    return functions


def prepare() -> None:
    """Gives torch as many threads as XLA has, and float32 products their full precision."""
    torch.set_num_threads(cores())
    torch.set_float32_matmul_precision("highest")


def gradients(grads: Mapping[str, jax.Array], matrices: set[str]) -> dict[str, Any]:
    """Copies gradients into tensors that all torch contenders share, matrices transposed.

    Kernels are `(in, out)` in JAX and `(out, in)` in torch: transposed, both orthogonalise and
    scale the same.
    """
    tensors = {}
    for path, grad in grads.items():
        x = np.array(grad, np.float32)  # a copy, for torch may write; torch has another bfloat16
        x = torch.from_numpy(np.ascontiguousarray(x.T if path in matrices else x))
        tensors[path] = x.to(device(), getattr(torch, grad.dtype.name))
    return tensors


class Step:
    """One step of `torch.optim.Muon` for `matrices` and of AdamW for the rest, from zeros."""

    def __init__(
        self,
        grads: Mapping[str, Any],
        matrices: set[str],
        learning_rate: float,
        newton_schulz: NewtonSchulz,
    ):
        self.newton_schulz = newton_schulz
        self.matrices = matrices
        self.parameters = {p: torch.nn.Parameter(torch.zeros_like(g)) for p, g in grads.items()}
        for path, grad in grads.items():
            self.parameters[path].grad = grad
        muon = [x for path, x in self.parameters.items() if path in matrices]
        rest = [x for path, x in self.parameters.items() if path not in matrices]
        self.optimizers: list[Any] = [torch.optim.Muon(muon, lr=learning_rate, weight_decay=0.0)]
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0))

    def start(self) -> None:
        """Takes one step and does not wait for it."""
        torch_source._zeropower_via_newtonschulz = self.newton_schulz
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        finally:
            torch_source._zeropower_via_newtonschulz = STOCK

    def __call__(self) -> None:
        """Takes one step and waits for it."""
        self.start()
        if device() == "cuda":
            torch.cuda.synchronize()

    def value(self, path: str) -> np.ndarray:
        """Returns a parameter as JAX would hold it."""
        x = self.parameters[path].detach().cpu().float().numpy()
        return x.T if path in self.matrices else x
