"""The command line, `python -m muonclip_jax describe` and `doctor`."""

import argparse
import sys
from collections.abc import Sequence

from muonclip_jax._commands.describe import describe
from muonclip_jax._commands.doctor import doctor
from muonclip_jax._devices import PLATFORMS
from muonclip_jax.newton_schulz.coefficients import COEFFICIENT_SETS, DEFAULT_METHOD, DEFAULT_SET
from muonclip_jax.newton_schulz.plan import NS_DTYPES, NS_METHODS


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    whole = argparse.ArgumentParser(
        prog="python -m muonclip_jax", description="Muon with QK-Clip for JAX: see what it does."
    )
    commands = whole.add_subparsers(dest="command", required=True)
    text = "labels and attention blocks of a checkpoint, and the cost of Muon per step"
    command = commands.add_parser("describe", help=text, description=f"Prints {text}.")
    add = command.add_argument
    add("checkpoint", help="a folder of Orbax (an item, a step or all), .npz or .safetensors")
    where = "where in it the parameters are, '' for all of it; by default the subtree 'params'"
    add("--params", metavar="PATH", help=where)
    add("--rules", metavar="MODULE:NAME", help="a MatrixRules to import, if the model needs one")
    add("--platform", choices=sorted(set(PLATFORMS.values())), help="by default what JAX runs on")
    add("--ns-coeffs", choices=tuple(COEFFICIENT_SETS), default=DEFAULT_SET)
    add("--ns-steps", type=int)
    add("--ns-method", choices=NS_METHODS, default=DEFAULT_METHOD)
    add("--ns-dtype", choices=NS_DTYPES)
    text = "the installation, the devices, and what will be used on them"
    commands.add_parser(
        "doctor", help=f"checks {text}", description=f"Checks {text}; 1 if something fails."
    )
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    options = vars(parser().parse_args(arguments))
    if options.pop("command") == "doctor":
        report, passed = doctor()
        print(report)
        return 0 if passed else 1
    try:
        print(describe(**options))
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
