"""The settings of `muonclip` as a value, derived from its signature."""

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import optax

from muonclip_jax._arguments import names_known
from muonclip_jax._tree import Tree
from muonclip_jax.optimizers import muonclip

Config = TypeVar("Config")


def _with_settings(cls: type[Config]) -> type[Config]:
    """Gives a class the arguments of `muonclip` as the fields of a frozen dataclass."""
    for name, argument in inspect.signature(muonclip).parameters.items():
        if name != "param_shardings":  # holds devices, which belong to a run
            cls.__annotations__[name] = argument.annotation
            if argument.default is not argument.empty:
                setattr(cls, name, argument.default)
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__init__ = names_known(cls.__init__)
    return cls


@_with_settings
class MuonClipConfig:
    """The settings of `muonclip` as a value: frozen, hashable, checked at construction.

    Its fields are the arguments of `muonclip`, except for `param_shardings`.

    Raises:
        ValueError: At construction, for a hyperparameter outside its range.
        TypeError: At construction, for a value that cannot be hashed, such as an array.

    Example:
        >>> config = MuonClipConfig(learning_rate=1e-3, qk_clip_threshold=None)
        >>> tx = config.build()
        >>> dataclasses.replace(config, weight_decay=0.0).weight_decay
        0.0
    """

    if TYPE_CHECKING:  # the fields come from the signature
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, learning_rate: float | optax.Schedule, **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        """Converts lists, as from a YAML or JSON file, to tuples, and checks every setting."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, _as_tuples(value))
        try:
            hash(self)
        except TypeError as error:
            raise TypeError(
                f"MuonClipConfig takes only hashable Python values ({error}). Pass arrays and "
                "traced values to muonclip(...) directly."
            ) from error
        self.build()

    def build(self, param_shardings: Tree = None) -> optax.GradientTransformationExtraArgs:
        """Builds the transformation.

        Args:
            param_shardings: As in `muonclip`.

        Returns:
            The transformation.
        """
        return muonclip(**vars(self), param_shardings=param_shardings)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
