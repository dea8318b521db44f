"""A refusal that waits for the platform: a value that no program can be lowered to compute.

Which platform a program runs on is known when it is lowered, long after it was traced. An
implementation that has no kernel for some platform puts a refusal into that platform's branch:
it is heard there, with its reason, and nowhere else.
"""

from typing import Any

from jax import lax
from jax.interpreters import batching, mlir
from jaxtyping import Array, Shaped

# The class of primitives; importing it from `jax.extend.core` would load Pallas.
_Primitive: Any = type(lax.add_p)
_refused_p = _Primitive("refused")


def refused(x: Shaped[Array, "..."], reason: str) -> Shaped[Array, "..."]:
    """Stands for `x` while tracing, and raises when it is to be lowered or computed.

    Raises:
        NotImplementedError: With the reason, once the platform is known.

    Example:
        >>> import jax
        >>> jax.eval_shape(lambda x: refused(x, "not here"), jax.ShapeDtypeStruct((2,), "f4")).shape
        (2,)
    """
    return _refused_p.bind(x, reason=reason)


def _raise(*arguments: Any, reason: str) -> Any:
    del arguments
    raise NotImplementedError(reason)


_refused_p.def_impl(_raise)
_refused_p.def_abstract_eval(lambda x, *, reason: x)
mlir.register_lowering(_refused_p, _raise)
batching.defvectorized(_refused_p)
