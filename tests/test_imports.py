"""What importing the package costs: no Flax, no test tools, no kernel, no device."""

import importlib
import pkgutil
import re
import sys
import tomllib
from types import ModuleType

import muonclip_jax
from tests.helpers import ROOT, finished


def test_the_package_loads_nothing_optional_and_touches_no_device_until_it_is_used():
    # A library that starts a backend on import takes away jax.distributed.initialize, which must
    # come before.
    script = """
import sys, optax.contrib
before = set(sys.modules)
import jax.numpy as jnp, muonclip_jax as mc
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "the import started a backend"
tx = mc.muonclip(1e-3, qk_clip_threshold=None)
params = {"up": {"kernel": jnp.ones((4, 8))}}
tx.update(params, tx.init(params), params)
mc.attention_max_logits(jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2, 8)))
print(*set(sys.modules) - before)
"""
    result = finished(sys.executable, "-W", "error", "-c", script)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    optional = {"flax", "orbax", "chex", "hypothesis", "beartype", "torch"}
    assert not optional & {name.split(".")[0] for name in loaded}
    kernels = ("experimental", "pallas", "muonclip_jax.kernels.")
    assert not [name for name in loaded if any(word in name for word in kernels)]


def test_what_the_package_requires_it_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in project["dependencies"]}
    text = "\n".join(path.read_text() for path in (ROOT / "muonclip_jax").glob("**/*.py"))
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE))
    assert required <= imported


def test_no_public_function_hides_a_module_of_its_name():
    # `import muonclip_jax.transforms.qk_clip as m` would bind the function.
    for found in pkgutil.walk_packages(muonclip_jax.__path__, "muonclip_jax."):
        package, _, name = found.name.rpartition(".")
        value = getattr(importlib.import_module(package), name, None)
        assert value is None or isinstance(value, ModuleType), found.name
