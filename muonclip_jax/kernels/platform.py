"""What a computation that is traced now is for: the platform, and whether one device is alone."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """A device, as far as kernels tell devices apart.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        capability: A GPU's compute capability, (0, 0) elsewhere.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)


def default_platform() -> str:
    """Returns the platform that a computation traced now is for, e.g. "cpu"."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else platform_of(device)


def platform_of(device: jax.Device) -> str:
    """Returns a device's platform as `default_platform` names it."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def _default_device() -> jax.Device:
    device = getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def device_memory() -> int | None:
    """Returns the bytes of memory of the default accelerator, or None where it does not say."""
    statistics = _default_device().memory_stats() or {}
    return statistics.get("bytes_limit")


def current_target() -> Target:
    """Returns the device that a computation traced now is for."""
    platform = default_platform()
    if platform not in ("gpu", "cuda", "rocm"):
        return Target(platform)
    capability = str(getattr(_default_device(), "compute_capability", "0.0"))
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
