"""Every test runs with eight CPU devices, so that sharding is always exercised."""

import importlib
import os

# Programs here are tiny and run once or twice: compiling them is the time, so LLVM does not
# optimise.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true"
)

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")

# The same examples on every run, and no deadline: the first one of a shape compiles.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_sessionstart() -> None:
    """Imports the package once, after jaxtyping's hook and before pytest collects its files.

    `--import-mode=importlib` would otherwise execute the first file that it collects a second time,
    and its classes would exist twice.
    """
    importlib.import_module("muonclip_jax")


# They need torch and others' code; the tests read the files that they wrote.
collect_ignore = [
    "tests/golden/write_migration_goldens.py",
    "tests/golden/write_torch_goldens.py",
]
