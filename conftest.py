"""Every test runs with eight CPU devices, so that sharding is always exercised."""

import gc
import importlib.util
import os
import re
from collections.abc import Generator, Iterator
from importlib.metadata import version

# Programs here are tiny and run once or twice, so the time goes into compiling them: LLVM does not
# optimize, and each program is one module for it. The older emitter of fused loops compiles four
# times as fast; later versions of XLA have only the newer one, the TPU compiler has neither, and
# both stop at an unknown flag.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * (version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None)
)

import hypothesis
import jax
import jaxtyping
import pytest
from packaging.version import Version

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_traceback_in_locations_limit", 0)  # lowers faster

# The same examples on every run, and no deadline: the first one of a shape compiles.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_sessionstart() -> None:
    """Imports the package once, after jaxtyping's hook and before pytest collects its files.

    `--import-mode=importlib` would otherwise execute the first file that it collects a second time,
    and its classes would exist twice.
    """
    importlib.import_module("muonclip_jax")


def pytest_collection_finish() -> None:
    """Collects garbage seldom: what tracing allocates is freed by its reference counts."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_freed() -> Iterator[None]:
    """A worker that keeps every program grows to several GB."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the check of annotations that `make test-all` adds to every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Needs torch and others' code; the tests read the files that it wrote.
collect_ignore = ["tests/golden/write_goldens.py"]
#: What came with a version of a package, by the errors of earlier ones. Tests skip what needs it;
#: examples in docstrings cannot.
CAME_WITH = {
    ("flax", "0.12.6"): "nnx.capture of Flax 0.12.6|nnx has no attribute 'capture'"
    r"|argument 'num_kv_heads'|RngStream.__call__\(\) takes 1",
    ("optax", "0.2.8"): r"muon\(\) got an unexpected keyword argument 'consistent_rms'",
    # The host's memory on CPUs, and gradients that XLA shards unevenly.
    ("jax", "0.10"): "annotate_device_placement|is incompatible with mesh_shape=OrderedDict",
}
ABSENT = {
    f"came with {package} {first}": messages
    for (package, first), messages in CAME_WITH.items()
    if Version(version(package)) < Version(first)
}
if "came with flax 0.12.6" in ABSENT:
    collect_ignore += ["muonclip_jax/nnx.py"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skips a test that needs, itself or in a program, what a package does not have yet."""
    try:
        return (yield)
    except Exception as error:
        for reason, messages in ABSENT.items():
            if absent := re.search(messages, str(error)):
                pytest.skip(f"{absent[0]}: {reason}")
        raise
