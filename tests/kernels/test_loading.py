"""Kernels are imported when named; where a version of JAX lacks something, naming is refused."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from muonclip_jax import attention_max_logits, muonclip, orthogonalize
from muonclip_jax.attention import inputs
from muonclip_jax.kernels import MAX_LOGITS, SYMMETRIC, load_kernel
from muonclip_jax.newton_schulz import plan, plan_polar

PALLAS = ("jax.experimental", "jax.experimental.pallas")
OPERATIONS = {"symmetric": SYMMETRIC, "max_logits": MAX_LOGITS}
KERNELS = [(operation, *each) for operation, names in OPERATIONS.items() for each in names.items()]


def test_the_package_loads_no_experimental_module_and_no_kernel_until_one_is_named():
    script = """
import sys, optax.contrib
before = set(sys.modules)
import jax, jax.numpy as jnp, muonclip_jax as mc
tx = mc.muonclip(1e-3, qk_clip_threshold=None)
params = {"up": {"kernel": jnp.ones((4, 8))}}
tx.update(params, tx.init(params), params)
mc.attention_max_logits(jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2, 8)))
new = set(sys.modules) - before
print(sorted(name for name in new if "experimental" in name or "pallas" in name))
print(sorted(name for name in new if name.startswith("muonclip_jax.kernels.")))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]


@pytest.mark.parametrize(("operation", "name", "platform"), KERNELS)
@pytest.mark.parametrize("missing", ["Pallas", "its platform", "a name"])
def test_a_kernel_that_jax_cannot_import_is_refused_and_nothing_else_breaks(
    operation, name, platform, missing, monkeypatch
):
    monkeypatch.setattr(plan, "plan_platform", lambda *_, **__: platform)
    monkeypatch.setattr(inputs, "plan_platform", lambda *_: platform)
    module = importlib.import_module(f"muonclip_jax.kernels.{operation}_{platform}")
    pallas_parent, pallas = map(importlib.import_module, PALLAS)
    part, name_used = {"tpu": ("tpu", "CompilerParams"), "gpu": ("mosaic_gpu", "Layout")}[platform]
    if missing == "Pallas":
        monkeypatch.delattr(pallas_parent, "pallas")
        monkeypatch.setitem(sys.modules, "jax.experimental.pallas", None)
    elif missing == "its platform":
        monkeypatch.delattr(pallas, part)
        monkeypatch.setitem(sys.modules, f"jax.experimental.pallas.{part}", None)
    else:
        monkeypatch.delattr(getattr(pallas, part), name_used)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(NotImplementedError, match=f"{name!r} needs a feature of Pallas"):
        load_kernel(operation, name, platform)
    x = jnp.ones((1, 4, 2, 8))
    use = {
        "symmetric": lambda: orthogonalize(x[0, 0], ns_implementation=name),
        "max_logits": lambda: attention_max_logits(x, x, implementation=name),
    }
    with pytest.raises(NotImplementedError, match=f"{name!r} needs a feature of Pallas"):
        use[operation]()
    params = {"up": {"kernel": jnp.ones((4, 8))}}
    tx = muonclip(1e-3, qk_clip_threshold=None)
    assert jax.tree.structure(tx.update(params, tx.init(params), params)[0])
    assert attention_max_logits(x, x).shape == (2,)


@pytest.mark.parametrize(("operation", "name", "platform"), KERNELS)
def test_a_kernel_for_another_platform_is_refused(operation, name, platform):
    with pytest.raises(NotImplementedError, match=f"runs on a {platform.upper()}.*'cpu'"):
        load_kernel(operation, name, "cpu")


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"ns_implementation='cublas' .* 'xla', 'mosaic_gpu', "):
        plan_polar(ns_implementation="cublas")
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="'nothing' is unknown; choose one of 'xla', 'mosaic_tpu'"):
        attention_max_logits(x, x, implementation="nothing")
