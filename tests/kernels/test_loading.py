"""A kernel that this JAX or platform cannot run is refused by its name, and nothing else breaks."""

import importlib
import sys

import jax
import jax.numpy as jnp
import pytest

from muonclip_jax import attention_max_logits, muonclip, orthogonalize
from muonclip_jax.attention import inputs
from muonclip_jax.kernels import MAX_LOGITS, SYMMETRIC, load_kernel
from muonclip_jax.newton_schulz import plan, plan_polar

OPERATIONS = {"symmetric": SYMMETRIC, "max_logits": MAX_LOGITS}
KERNELS = [(operation, *each) for operation, names in OPERATIONS.items() for each in names.items()]


@pytest.mark.parametrize(
    ("operation", "name", "platform", "missing"),
    [(*kernel, missing) for kernel in KERNELS for missing in ("its platform", "a name")]
    + [(*KERNELS[0], "Pallas")],
)
def test_a_kernel_that_jax_cannot_import_is_refused_and_nothing_else_breaks(
    operation, name, platform, missing, monkeypatch
):
    monkeypatch.setattr(plan, "plan_platform", lambda *_, **__: platform)
    monkeypatch.setattr(inputs, "plan_platform", lambda *_: platform)
    module = importlib.import_module(f"muonclip_jax.kernels.{operation}_{platform}")
    parent, pallas = map(importlib.import_module, ("jax.experimental", "jax.experimental.pallas"))
    part, name_used = {"tpu": ("tpu", "CompilerParams"), "gpu": ("mosaic_gpu", "Layout")}[platform]
    if missing == "a name":
        monkeypatch.delattr(getattr(pallas, part), name_used)
    else:
        owner, gone = (parent, "pallas") if missing == "Pallas" else (pallas, part)
        monkeypatch.delattr(owner, gone)
        monkeypatch.setitem(sys.modules, f"{owner.__name__}.{gone}", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    x, params = jnp.ones((1, 4, 2, 8)), {"up": {"kernel": jnp.ones((4, 8))}}
    use = {
        "symmetric": lambda: orthogonalize(x[0, 0], ns_implementation=name),
        "max_logits": lambda: attention_max_logits(x, x, implementation=name),
    }[operation]
    for attempt in (lambda: load_kernel(operation, name, platform), use):
        with pytest.raises(NotImplementedError, match=f"{name!r} needs a feature of Pallas"):
            attempt()
    tx = muonclip(1e-3, qk_clip_threshold=None)
    assert jax.tree.structure(tx.update(params, tx.init(params), params)[0])
    assert attention_max_logits(x, x).shape == (2,)


def test_unknown_names_and_other_platforms_are_refused():
    for operation, name, platform in KERNELS:
        with pytest.raises(NotImplementedError, match=f"runs on a {platform.upper()}.*'cpu'"):
            load_kernel(operation, name, "cpu")
    with pytest.raises(ValueError, match=r"ns_implementation='cublas' .* 'xla', 'mosaic_gpu', "):
        plan_polar(ns_implementation="cublas")
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"'nothing' is not known.* one of 'xla', 'mosaic_tpu'"):
        attention_max_logits(x, x, implementation="nothing")
