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

#: The platforms that JAX lowers for, and what `platform=` calls them.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def plan_platform(
    given: str | None, mesh: Mesh | AbstractMesh | None = None, arrays: Iterable[object] = ()
) -> str:
    """Decides which platform a computation is for.

    It is the first that is known of: the caller's (checked), and those of the mesh's devices, which
    an abstract one may know too, of the arrays, which have none while tracing, of
    `jax.default_device` and of JAX's default backend.
    """
    if given is not None:
        return given
    known = [x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    abstract = getattr(getattr(mesh, "abstract_device", None), "platform", None)
    default = getattr(jax.config, "jax_default_device", None)
    if isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
    elif abstract is not None:
        device = abstract
    elif known:
        device = next(iter(known[0].devices()))
    else:
        device = jax.default_backend() if default is None else default
    name = str(getattr(device, "platform", device))
    return PLATFORMS.get(name, name)


# Returns its operand while tracing, and raises when it is lowered or computed: in a branch of
# `lax.platform_dependent` for that platform, which is known only when the program is lowered.
# (Importing the class of primitives from `jax.extend.core` would load Pallas.)
_Primitive: Any = type(lax.add_p)
_refused_p = _Primitive("refused")


def _raise(*arguments: object, reason: str) -> NoReturn:
    del arguments
    raise NotImplementedError(reason)


_refused_p.def_impl(_raise)
_refused_p.def_abstract_eval(lambda x, *, reason: x)
mlir.register_lowering(_refused_p, _raise)
batching.defvectorized(_refused_p)


def check_lowering(platform: str) -> jax.Array:
    """Returns a zero, and raises a NotImplementedError when lowered for another platform.

    It is added to a number of a program that was planned for `platform` without the caller giving
    it, so that exporting the program for another platform is an error.
    """
    zero = jnp.asarray(0.0)  # weak: what it is added to keeps its dtype
    lowered = [name for name, ours in PLATFORMS.items() if ours == platform]
    if not lowered:
        return zero
    reason = (
        f"This program was planned for platform {platform!r}, that of its mesh or of JAX's default "
        "device, and is lowered for another one. Pass platform='cpu', 'gpu' or 'tpu' to "
        "scale_by_muon, muon, muonclip or orthogonalize; platform='cpu' computes in float32 and "
        "can be lowered for any platform, also for several at once."
    )
    return lax.platform_dependent(
        zero,
        default=lambda x: _refused_p.bind(x, reason=reason),
        **dict.fromkeys(lowered, lambda x: x),
    )


def device_memory(platform: str) -> int | None:
    """Returns the bytes of memory of a device of a platform, or None where it is not known."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if PLATFORMS.get(device.platform, device.platform) != platform:
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
    if to == "invarying" and jax.__version_info__ < (0, 10):  # where it has a private name
        from jax._src.lax.parallel import all_gather_invariant

        return all_gather_invariant(x, names, axis=axis, tiled=tiled)
    return lax.all_gather(x, names, axis=axis, tiled=tiled, to=to)
