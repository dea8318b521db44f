"""The report's tables of what QK-Clip and recording its maxima cost, and of blocks on a CPU."""

from benchmarks.report_text import Results, missing, ranged, table, times


def clip_table(results: Results) -> str:
    """The clip over one pass through the query and key kernels."""
    stored = results.get("clip_cost")
    if stored is None:
        return missing("clip_cost")
    kinds = list(stored["rows"][0]["over_yardstick"])
    lines = [
        [
            f"`{row['what']}`",
            row["tree"],
            row["dtype"],
            f"{row['bytes'] / 1e6:.0f}",
            *(times(row["over_yardstick"][kind]) for kind in kinds),
        ]
        for row in stored["rows"]
    ]
    return table(["", "tree", "dtype", "MB of q and k", *(f"{kind} over" for kind in kinds)], lines)


def recording_table(results: Results) -> str:
    """A training step of attention with its maxima over one without."""
    stored = results.get("attention_recording")
    if stored is None:
        return missing("attention_recording")
    lines = []
    for row in stored["rows"]:
        without, beside = (
            f"{100 * (row[name] - 1):+.1f} % ({100 * (row['fastest_' + name] - 1):+.1f} %)"
            for name in ("recording_over_without", "recording_over_jax_nn")
        )
        seconds = row["median_seconds"]["recording"]
        causal = "causal" if row["is_causal"] else "all pairs"
        shape = f"T = {row['shape'][1]}, head size {row['shape'][3]}, {causal}"
        lines.append([shape, f"{seconds:.2f}", without, beside])
    head = ["", "s", "over the same without recording", "over `jax.nn.dot_product_attention`"]
    return table(head, lines)


def blocks_table(results: Results) -> str:
    """One symmetric product on a CPU, in blocks."""
    stored = results.get("block_products")
    if stored is None:
        return missing("block_products")
    lines = [
        [
            row["contender"],
            ranged({k: _milli(v) for k, v in row["seconds"].items() if k != "rounds"}, 2),
            times(row["over_whole"]),
        ]
        for row in stored["rows"]
    ]
    return table(["", "ms", "over the whole product"], lines)


def _milli(value: float | list[float]) -> float | list[float]:
    return [1e3 * each for each in value] if isinstance(value, list) else 1e3 * value
