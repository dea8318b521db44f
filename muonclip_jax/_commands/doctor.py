"""`doctor`: installed packages, devices, and the defaults of the library on this machine."""

import contextlib
import functools
import importlib.metadata
import platform as machine
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._devices import plan_platform
from muonclip_jax.attention.dot_product import attention_max_logits, dot_product_attention
from muonclip_jax.kernels import MAX_LOGITS, SYMMETRIC, load_kernel
from muonclip_jax.matrices import describe_cost
from muonclip_jax.newton_schulz import orthogonalize
from muonclip_jax.newton_schulz.coefficients import DEFAULT_SET

#: A line of the report: True or False for a check, None for information; and its text.
Finding: TypeAlias = tuple[bool | None, str]

#: What the library does not need: what it is for.
OPTIONAL = {
    "muonclip_jax": "this is a folder of its source",
    "flax": "it is for muonclip_jax.linen and muonclip_jax.nnx",
    "orbax-checkpoint": "it is for `python -m muonclip_jax describe` on folders of Orbax",
}
# Device files on Linux, and what lets JAX use the device.
_ACCELERATORS = {"/dev/nvidia0": "jax[cuda13]", "/dev/accel0": "jax[tpu]"}
#: Matrices of GPT-2 small and of Llama 2 7B, as (rows, columns).
SHAPES = ((768, 768), (768, 3072), (4096, 4096), (4096, 11008))
# Bounds on well-conditioned matrices: the default's five steps end in 0.68 to 1.2, and 16-bit
# products move that by a few hundredths.
_SINGULAR_VALUES = (0.6, 1.25)


def doctor() -> tuple[str, bool]:
    """Checks the installation and the devices: the report, and whether every check passed."""
    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "Packages": packages,
        "Devices": devices,
        "Newton-Schulz": newton_schulz,
        "Attention and kernels": implementations,
        "A small run of each": small_runs,
    }
    marks = {True: "ok  ", False: "FAIL", None: "    "}
    lines: list[str] = []
    passed = True
    for title, check in sections.items():
        found: list[Finding] = []
        try:
            found.extend(check())
        except Exception as error:  # whatever a broken installation raises is the finding
            found.append((False, f"{type(error).__name__}: {error}"))
        lines += [title, *(f"  {marks[ok]} {text}" for ok, text in found)]
        passed = passed and all(ok is not False for ok, _ in found)
    verdict = "Everything that was checked works." if passed else "Something does not work: FAIL."
    return "\n".join([*lines, verdict]), passed


def packages() -> Iterator[Finding]:
    """Installed versions, compared with the package's requirements."""
    yield None, f"Python {machine.python_version()}"
    requirements: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        requirements = importlib.metadata.requires("muonclip_jax") or []
    pattern = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\d.]+)")
    least = {m[1]: m[2] for x in reversed(requirements) if (m := pattern.match(x))}
    for name in dict.fromkeys(("muonclip_jax", "jax", "jaxlib", "optax", *OPTIONAL)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            cure = f"; {OPTIONAL[name]}" if name in OPTIONAL else f": pip install {name}"
            yield None if name in OPTIONAL else False, f"{name} is not installed{cure}"
            continue
        wanted = least.get(name, "")
        # As numbers: 1.10 is newer than 1.9.
        have, need = (list(map(int, re.findall(r"\d+", v))) for v in (version, wanted))
        if have < need:
            yield False, f"{name} {version} is too old: pip install '{name}>={wanted}'"
        else:
            yield True, f"{name} {version}" + (f" ({wanted} or newer)" if wanted else "")


def devices() -> Iterator[Finding]:
    """The devices of JAX."""
    found = jax.devices()
    kinds = ", ".join(dict.fromkeys(device.device_kind for device in found))
    platform = plan_platform(None)
    yield True, f"{len(found)} x {platform} ({kinds}), {jax.process_count()} process(es)"
    for path, package in _ACCELERATORS.items():
        if platform == "cpu" and Path(path).exists():
            yield None, f"there is {path}, and JAX uses the CPU: pip install '{package}'"
    wide = "on" if jax.dtypes.canonicalize_dtype("float64") == jnp.float64 else "off"
    yield None, f"64-bit types are {wide}"


def newton_schulz() -> Iterator[Finding]:
    """The choices of `ns_method="auto"` and `ns_dtype=None` here, for shapes of known models."""
    matrices = {f"w{n}": jax.ShapeDtypeStruct(shape, "float32") for n, shape in enumerate(SHAPES)}
    yield None, f"muonclip: ns_coeffs {DEFAULT_SET!r}, and for matrices"
    for line in describe_cost(matrices).partition("\n\n")[0].splitlines():
        yield None, f"  {line}"


def implementations() -> Iterator[Finding]:
    """Attention with maxima and Pallas kernels: which of them work here, and the defaults."""
    x, platform = jax.ShapeDtypeStruct((1, 2048, 16, 128), jnp.bfloat16), plan_platform(None)
    attend = functools.partial(dot_product_attention, is_causal=True, implementation="cudnn")
    load = {
        operation: {n: functools.partial(load_kernel, operation, n, platform) for n in names}
        for operation, names in (("symmetric", SYMMETRIC), ("max_logits", MAX_LOGITS))
    }
    for argument, attempts in (
        ("dot_product_attention", {"cudnn": lambda: jax.jit(attend).lower(x, x, x)}),
        ("ns_implementation", load["symmetric"]),
        ("attention_max_logits", load["max_logits"]),
    ):
        yield None, f"{argument}: 'xla' is the default"
        for name, attempt in attempts.items():
            try:
                attempt()
                yield None, f"  {name!r} is available"
            except NotImplementedError as error:
                yield None, f"  {str(error).partition('. ')[0].rstrip('.')}"


def small_runs() -> Iterator[Finding]:
    """Results on this device against NumPy in float64."""
    rng = np.random.default_rng(0)
    # Sixty-four directions of size one to two among 256: every one has to come out near one.
    x = np.linalg.qr(rng.standard_normal((256, 64)))[0] * np.linspace(1, 2, 64)
    y = np.asarray(orthogonalize(jnp.asarray(x, jnp.float32)), np.float64)
    largest, *_, smallest = np.linalg.svd(y, compute_uv=False)
    low, high = _SINGULAR_VALUES
    text = f"singular values from {smallest:.2f} to {largest:.2f}, bounds {low} and {high}"
    yield bool(low <= smallest and largest <= high), f"orthogonalize: {text}"
    query, key = rng.standard_normal((2, 2, 64, 4, 32)).astype(np.float32)
    found = np.asarray(attention_max_logits(jnp.asarray(query), jnp.asarray(key)), np.float64)
    logits = np.einsum("btnh,bsnh->nbts", query.astype(np.float64), key) / np.sqrt(32)
    off = float(np.max(np.abs(found / logits.max((1, 2, 3)) - 1)))
    # A TPU multiplies float32 in bfloat16 unless told otherwise.
    yield off < 2e-2, f"attention_max_logits: off by {off:.1e}, expected below 2e-02"
