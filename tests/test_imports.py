"""What importing the package costs: no Flax, no test tools, no device."""

import ast
import importlib
import pkgutil
import re
import sys
import tomllib
from types import ModuleType

import muonclip_jax
from tests.helpers import ROOT, finished


def test_importing_the_package_loads_no_optional_dependency_and_touches_no_device():
    # A library that starts a backend on import takes away jax.distributed.initialize, which must
    # come before.
    script = """
import muonclip_jax, sys
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "the import started a backend"
print(*{name.split(".")[0] for name in sys.modules})
"""
    result = finished(sys.executable, "-W", "error", "-c", script)
    assert result.returncode == 0, result.stderr
    optional = {"flax", "orbax", "chex", "hypothesis", "beartype", "torch"}
    assert not optional & set(result.stdout.split())


def test_what_the_package_requires_it_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in project["dependencies"]}
    imported = set()
    for path in (ROOT / "muonclip_jax").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert required <= imported


def test_no_public_function_hides_a_module_of_its_name():
    # `import muonclip_jax.transforms.qk_clip as m` would bind the function.
    for found in pkgutil.walk_packages(muonclip_jax.__path__, "muonclip_jax."):
        package, _, name = found.name.rpartition(".")
        value = getattr(importlib.import_module(package), name, None)
        assert value is None or isinstance(value, ModuleType), found.name
