"""Which implementation computes a symmetric product.

A kernel that has to be chosen by itself must be sure of three things: that the compiler takes it,
that it is alone on its device (XLA cannot split a kernel over a mesh), and that it saves time. The
last is counted, in tiles: half of a few tiles may need as many rounds of the processors as all of
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from muonclip_jax.kernels.platform import Target, current_target, is_alone
from muonclip_jax.kernels.symmetric import mosaic_gpu, mosaic_tpu, tilings, triton
from muonclip_jax.kernels.symmetric.problem import Kernel, Problem
from muonclip_jax.kernels.symmetric.triangle import tiles_along

# Those whose time is estimated.
_COUNTED = ("mosaic_tpu", "mosaic_gpu")
# Chosen without being named from this estimated speed-up on. Where halves of tiles, cold caches and
# a library's better tuning are not in the estimate, this much of it must be left.
_WORTHWHILE = 1.25


@dataclass(frozen=True)
class Implementation:
    """A way to compute the products.

    Attributes:
        run: The kernel.
        refusal: Why it does not take a problem, or None.
        platform: Where it runs, in JAX's word.
    """

    run: Kernel
    refusal: Callable[[Problem], str | None]
    platform: str


#: The kernels by name, for each platform the fastest first; beside them there is "xla".
KERNELS: dict[str, Implementation] = {
    "mosaic_tpu": Implementation(mosaic_tpu.run, mosaic_tpu.refusal, "tpu"),
    "mosaic_gpu": Implementation(mosaic_gpu.run, mosaic_gpu.refusal, "gpu"),
    "triton": Implementation(triton.run, triton.refusal, "gpu"),
}
#: The kernels that add to a product which is not symmetric.
MATMUL_ADD: dict[str, Implementation] = {
    "mosaic_gpu": Implementation(mosaic_gpu.run_matmul_add, mosaic_gpu.refusal, "gpu"),
}
#: What `implementation=` allows; "pallas" is the platform's first kernel that takes the problem.
IMPLEMENTATIONS = ("xla", "pallas", *KERNELS)


def speed_up(name: str, problem: Problem) -> float:
    """Estimates by how much a kernel is faster than the full product, from counts of tiles."""
    batch, rows = problem.batch, problem.rows
    if name == "mosaic_tpu":
        return 2 * rows**2 / mosaic_tpu.work(rows)
    full = min(
        tiles_along(
            batch * tiles_along(rows, height) * tiles_along(rows, width),
            tilings.MULTIPROCESSORS,
        )
        * (height * width / 128**2)
        / rate
        for height, width, rate in ((256, 128, 1.0), (128, 128, 0.87))
    )
    return full / tilings.waves(tilings.choose_tiling(batch, rows), batch, rows)


def kernels_for(problem: Problem) -> dict[str, Implementation]:
    """Returns the kernels for a kind of product."""
    return KERNELS if problem.columns is None else MATMUL_ADD


def runs_on(name: str, target: Target) -> bool:
    """Returns whether a kernel is for this device, whatever the product."""
    if KERNELS[name].platform != target.platform:
        return False
    # Hopper's `wgmma` is in no GPU before it, and in none after.
    if name == "mosaic_gpu":
        return target.capability[0] == 9
    return name != "triton" or target.capability >= (8, 0)


def choose(problem: Problem, implementation: str | None, platform: str | None = None) -> str:
    """Resolves `implementation=` to "xla" or a key of `KERNELS`.

    Args:
        problem: What is to be computed.
        implementation: A name of `IMPLEMENTATIONS`, or None.
        platform: What it will run on; None is JAX's default.

    Returns:
        The name.

    Raises:
        ValueError: If there is no implementation of that name.
        NotImplementedError: If the named one cannot compute this.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} is none of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}; None chooses one."
        )
    if implementation == "xla":
        return "xla"
    kernels = kernels_for(problem)
    if implementation in KERNELS:
        reason = "there is no such kernel for products that are not symmetric"
        if implementation in kernels:
            reason = kernels[implementation].refusal(problem)
        if reason is not None:
            raise NotImplementedError(_refused(implementation, reason))
        return implementation
    target = current_target(platform)
    candidates = [name for name in kernels if runs_on(name, target)]
    reasons = {name: kernels[name].refusal(problem) for name in candidates}
    fit = [name for name, reason in reasons.items() if reason is None]
    if implementation is None:
        # The others have to be named: Triton's version is for GPUs that nothing here describes, and
        # without symmetry there are no products to be saved.
        taken = [name for name in fit if name in _COUNTED and problem.columns is None]
        if not is_alone():
            return "xla"
        return next((name for name in taken if speed_up(name, problem) >= _WORTHWHILE), "xla")
    if fit:
        return fit[0]
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(
        _refused("pallas", listed or f"there is no kernel for a {target.platform} of this kind")
    )


def _refused(name: str, reason: str) -> str:
    return (
        f"implementation={name!r} cannot compute this product: {reason}. Pass implementation=None "
        "to have one chosen that can, or 'xla'."
    )
