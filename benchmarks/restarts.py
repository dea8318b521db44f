"""Prints where the Gram form restarts, for every named set or for coefficients of your own.

python benchmarks/restarts.py
python benchmarks/restarts.py --rows "[[2, -1.5, 0.5], [2, -1.5, 0.5]]"
"""

import argparse
import json

from muonclip_jax.polar.coefficients import COEFFICIENT_SETS, resolve_coefficients
from muonclip_jax.polar.precision import guarded_rows
from muonclip_jax.polar.restarts import (
    SPURIOUS,
    amplifications,
    choose_restarts,
    is_gram_safe,
)


def main() -> None:
    """Prints a markdown table: restarts, amplification of rounding with and without, safety."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=json.loads, help="rows or a triple, as JSON")
    parser.add_argument("--steps", type=int, default=None, help="number of steps")
    args = parser.parse_args()
    names = list(COEFFICIENT_SETS) if args.rows is None else [args.rows]
    print(
        "| coefficients | dtype | restart after steps | amplification | without restarts | safe |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        rows, _ = resolve_coefficients(name, args.steps)
        for dtype in ("float32", "float16"):
            guarded = guarded_rows(rows, dtype, "gram")
            places = choose_restarts(guarded, dtype)
            worst = max(amplifications(guarded, places, SPURIOUS[dtype]))
            without = max(amplifications(guarded, (), SPURIOUS[dtype]))
            label = name if isinstance(name, str) else f"{len(rows)} rows"
            shown = ", ".join(map(str, places)) or "none"
            safe = "yes" if is_gram_safe(guarded, dtype) else "no"
            print(f"| {label} | {dtype} | {shown} | {worst:.3g} | {without:.3g} | {safe} |")


if __name__ == "__main__":
    main()
