"""The platform that a computation is planned for, and whether one device is alone.

Dtype, form and order of work depend on the platform, and JAX does not know it while it traces: the
same trace may be lowered for any platform (`jax.export`). So it is decided once, by
`plan_platform`, and a decision that was not the caller's is compared with the platform that the
program is lowered for (`check_lowering`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh

from muonclip_jax.kernels.refusal import refused

#: What `platform=` allows, with the names that JAX lowers for.
PLATFORMS = {"cpu": ("cpu",), "gpu": ("cuda", "rocm"), "tpu": ("tpu",)}


@dataclass(frozen=True)
class Target:
    """A device, as far as kernels tell devices apart.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        capability: A GPU's compute capability, (0, 0) elsewhere.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)


def check_platform(platform: Any) -> str | None:
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


def plan_platform(given: str | None, mesh: Any = None, arrays: Iterable[Any] = ()) -> str:
    """Decides which platform a computation is for.

    Args:
        given: What the caller says (checked), or None.
        mesh: The mesh that the computation runs on, where it is known. An abstract one may know
            its devices too.
        arrays: What it starts from. While tracing they do not tell their device.

    Returns:
        The first that is known: the caller's, that of the mesh's devices, that of the arrays, that
        of `jax.default_device`, that of JAX's default backend.
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
    """Returns the number zero, which cannot be lowered for another platform than this one.

    Added to a number of a program that was planned for `platform` without the caller's word, it
    refuses to export that program for a platform that it was not planned for.

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


def _platform_of(device: Any) -> str:
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


def current_target(platform: str | None = None) -> Target:
    """Returns the device that a computation for a platform runs on; None is the default one."""
    platform = plan_platform(platform)
    device = _default_device()
    if platform != "gpu" or _platform_of(device) != "gpu":
        return Target(platform)
    capability = str(getattr(device, "compute_capability", "0.0"))
    major, _, minor = capability.partition(".")
    known = major.isdigit() and minor.isdigit()
    return Target("gpu", (int(major), int(minor)) if known else (0, 0))


def is_alone() -> bool:
    """Returns whether what is traced now is one device's own program.

    XLA cannot split a kernel over a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)
