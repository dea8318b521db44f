"""Names for the types that signatures share."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax

#: A Python number, or a JAX scalar, concrete or traced.
ScalarLike: TypeAlias = float | int | jax.Array
#: A scalar, or a function of the number of updates so far.
ScalarOrSchedule: TypeAlias = ScalarLike | Callable[[Any], Any]
#: Any tree of arrays; leaves may also be `jax.ShapeDtypeStruct`s where only shapes matter.
Tree: TypeAlias = Any


@runtime_checkable
class Shaped(Protocol):
    """What shape inference may look at: an array, a tracer or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        ...

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        ...
