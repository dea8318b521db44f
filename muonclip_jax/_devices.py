"""The platform that a computation is planned for, and over which mesh axes an array varies.

Dtype, form and order of work depend on the platform, which is unknown while tracing: the same trace
may be lowered for any platform (`jax.export`). So it is decided once, by `plan_platform`, and
unless the caller gave it, lowering for another platform is an error (`check_lowering`).
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Shaped

#: What `platform=` allows, with the names that JAX lowers for.
PLATFORMS = {"cpu": ("cpu",), "gpu": ("cuda", "rocm"), "tpu": ("tpu",)}


def check_platform(platform: object) -> str | None:
    """Returns a caller's `platform=` in the words of `PLATFORMS`.

    Raises:
        ValueError: If there is no such platform.

    Example:
        >>> check_platform("cuda")
        'gpu'
    """
    if platform is None:
        return None
    for name, lowered in PLATFORMS.items():
        if isinstance(platform, str) and platform in (name, *lowered):
            return name
    raise ValueError(
        f"platform={platform!r} is not known. Pass one of {', '.join(map(repr, PLATFORMS))}, or "
        "None for that of the mesh's devices or of JAX's default one."
    )


def plan_platform(
    given: str | None, mesh: Mesh | AbstractMesh | None = None, arrays: Iterable[object] = ()
) -> str:
    """Decides which platform a computation is for.

    Args:
        given: The caller's platform (checked), or None.
        mesh: The mesh of the computation, if known. An abstract one may know its devices too.
        arrays: The inputs. While tracing they have no device.

    Returns:
        The first that is known of: the caller's, and those of the mesh's devices, the arrays,
        `jax.default_device` and JAX's default backend.
    """
    if given is not None:
        return given
    if isinstance(mesh, Mesh):
        return _platform_of(mesh.devices.flat[0])
    described = getattr(getattr(mesh, "abstract_device", None), "platform", None)
    if described is not None:
        return _in_our_words(described)
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            return _platform_of(next(iter(array.devices())))
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return _in_our_words(jax.default_backend())
    return _in_our_words(device) if isinstance(device, str) else _platform_of(device)


def check_lowering(platform: str) -> jax.Array:
    """Returns a zero that can only be lowered for this platform.

    It is added to a number of a program that was planned for `platform` without the caller giving
    it, so that exporting the program for another platform is an error.

    Raises:
        NotImplementedError: When the program is lowered for another platform.
    """
    zero = jnp.asarray(0.0)  # weak: what it is added to keeps its dtype
    if platform not in PLATFORMS:
        return zero
    reason = (
        f"This program was planned for platform {platform!r}, that of its mesh or of JAX's default "
        "device, and is lowered for another one. Pass platform='cpu', 'gpu' or 'tpu' to "
        "scale_by_muon, muon, muonclip or orthogonalize; platform='cpu' computes in float32 and "
        "can be lowered for any platform, also for several at once."
    )
    return lax.platform_dependent(
        zero,
        default=lambda x: refused(x, reason),
        **dict.fromkeys(PLATFORMS[platform], lambda x: x),
    )


# The class of primitives; importing it from `jax.extend.core` would load Pallas.
_Primitive: Any = type(lax.add_p)
_refused_p = _Primitive("refused")


def refused(x: Shaped[Array, "..."], reason: str) -> Shaped[Array, "..."]:
    """Returns `x` while tracing, and raises when the program is lowered or computed.

    In a branch of `lax.platform_dependent` it raises for that platform, which is known only when
    the program is lowered.

    Raises:
        NotImplementedError: With the reason, once the platform is known.

    Example:
        >>> jax.eval_shape(lambda x: refused(x, "not here"), jax.ShapeDtypeStruct((2,), "f4")).shape
        (2,)
    """
    return _refused_p.bind(x, reason=reason)


def _raise(*arguments: object, reason: str) -> NoReturn:
    del arguments
    raise NotImplementedError(reason)


_refused_p.def_impl(_raise)
_refused_p.def_abstract_eval(lambda x, *, reason: x)
mlir.register_lowering(_refused_p, _raise)
batching.defvectorized(_refused_p)


def _platform_of(device: jax.Device) -> str:
    return _in_our_words(device.platform)


def _in_our_words(platform: str) -> str:
    return next((name for name, lowered in PLATFORMS.items() if platform in lowered), platform)


def _default_device() -> jax.Device:
    device = getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def device_memory(platform: str) -> int | None:
    """Returns the bytes of memory of a device of a platform, or None where it is not known."""
    device = _default_device()
    if platform == "cpu" or _platform_of(device) != platform:
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def entry_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the mesh axes over which an array varies, in a checked `jax.shard_map`."""
    kind: Any = jax.typeof(x)
    # JAX called it `vma` until 0.10.1.
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns `x`, known to vary over the mesh axes too that `other` is known to vary over.

    Inside of a branch, JAX would cast `x`; the derivative of a cast is a sum over devices, and
    those that take another branch would never join it.
    """
    missing = tuple(sorted(varying_axes(other) - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def all_gather(x: jax.Array, names: tuple[str, ...], axis: int, *, tiled: bool = True) -> jax.Array:
    """`lax.all_gather` whose result has an invarying type in a checked `shard_map`.

    In a `shard_map` with `check_vma=False` and in `pmap`, the derivative of a gather with
    `to="invarying"` is wrong: a device returns its own cotangent instead of the sum over devices.
    """
    to = "invarying" if varying_axes(x).intersection(names) else "varying"
    return lax.all_gather(x, names, axis=axis, tiled=tiled, to=to)
