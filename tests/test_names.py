"""Names that a user may import are bound to one thing."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import muonclip_jax

PACKAGES = ["muonclip_jax"] + [
    module.name
    for module in pkgutil.walk_packages(muonclip_jax.__path__, "muonclip_jax.")
    if module.ispkg and "._" not in module.name
]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_function_hides_a_module_of_its_name(package: str):
    # `import muonclip_jax.transforms.qk_clip as m` would bind the function.
    module = importlib.import_module(package)
    submodules = {found.name for found in pkgutil.iter_modules(module.__path__)}
    hidden = [
        name
        for name, value in inspect.getmembers(module)
        if name in submodules and not isinstance(value, ModuleType)
    ]
    assert not hidden
