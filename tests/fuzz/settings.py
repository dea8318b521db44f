"""Random arguments of the transformations and of `Distribution`."""

from typing import Any

from tests.fuzz.cases import Draw


def draw_options(draw: Draw, factory: str, x64: bool, clip: bool) -> tuple[tuple[str, Any], ...]:
    """Returns the arguments of a public function, by name."""
    if factory == "apply_qk_clip":
        return tuple(_clip_options(draw, "").items())
    options: dict[str, Any] = _coefficients(draw, factory)
    options["ns_method"] = draw.weighted({"auto": 4, "standard": 3, "gram": 2, "svd": 0.7})
    narrow = {None: 16, "float32": 2, "bfloat16": 0.7, "float16": 0.7, "float64": 3 * x64}
    options["ns_dtype"] = draw.weighted(narrow)
    options["beta"] = draw.choice(0.95, 0.8, 0.0)
    options["nesterov"] = draw.chance(0.6)
    options["mu_dtype"] = draw.weighted({None: 8, "float32": 1, "bfloat16": 1})
    if factory == "scale_by_muon":
        options["adaptive"] = draw.chance(0.4)
        options["bias_correction"] = draw.chance(0.4)
        options["relative_eps"] = draw.chance(0.8)
        return tuple(options.items())
    options["learning_rate"] = draw.choice(0.1, "optax.linear_schedule(0.125, 0.0625, 2)")
    options["weight_decay"] = draw.choice(0.0, 0.3)
    options["consistent_rms"] = draw.choice(0.2, None)
    options["weight_decay_mask"] = draw.weighted({None: 7, "tree": 1, "function": 1})
    if factory == "muon":
        options["adaptive"] = draw.chance(0.25)
    elif clip:
        options |= _clip_options(draw, "qk_clip_")
    else:
        options["qk_clip_threshold"] = None
    return tuple(options.items())


def _clip_options(draw: Draw, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}threshold": draw.choice(100.0, 60.0),
        f"{prefix}alpha": draw.choice(0.5, 0.25, 1.0),
        f"{prefix}shared_keys": draw.weighted({"query": 3, "group": 1, "balanced": 1}),
    }


def _coefficients(draw: Draw, factory: str) -> dict[str, Any]:
    """Mostly few steps: they show what many do, and compile faster."""
    coefficients = draw.weighted(
        {
            "keller_jordan": 4,
            "minimax4": 3,
            "triple": 2,
            "you": 1,
            "turbo": 1,
        }
    )
    if coefficients == "triple":
        return {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": draw.choice(1, 2)}
    options: dict[str, Any] = {"ns_coeffs": coefficients}
    # The first rows of "minimax4" are steep beyond 1, and the library scales them in float32.
    if coefficients == "keller_jordan" or (coefficients != "minimax4" and factory != "muon"):
        options["ns_steps"] = draw.choice(1, 2, 3)
    if coefficients != "turbo" and draw.chance(0.25):
        options["preconditioning"] = draw.choice(
            "frobenius", "spectral", "aol", "schatten", "schatten8"
        )
    return options


def draw_distribution(draw: Draw, names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """Returns the arguments of `Distribution` on a mesh with axes of these names."""
    options: dict[str, Any] = {}
    if draw.chance(0.3):
        options["axes"] = draw.some(names, 0.6)
    if draw.chance(0.3):
        options["max_matrix_bytes"] = draw.choice(64, 400, 1500)
    if draw.chance(0.3):
        options["max_stack_bytes"] = draw.choice(1, 1000, 4000)
    if draw.chance(0.4):
        options["flops_per_byte"] = draw.choice(0.0, 1.0, "inf")
    if draw.chance(0.5):
        options["shard_momentum"] = True
    return tuple(options.items())
