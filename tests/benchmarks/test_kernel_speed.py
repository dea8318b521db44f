"""Which kernels are timed on which device."""

import argparse

import pytest

from benchmarks import kernel_speed
from benchmarks.kernel_cases_symmetric import Case
from muonclip_jax.kernels.platform import Target
from muonclip_jax.kernels.symmetric import dispatch

OPTIONS = argparse.Namespace(smoke=False, tilings=False)


# Tuples: workers must agree in the names of the tests, and a set has no order.
@pytest.mark.parametrize(
    ("target", "kernels"),
    [
        (Target("cpu"), ()),
        (Target("tpu"), ("mosaic_tpu",)),
        (Target("gpu", (9, 0)), ("mosaic_gpu", "triton")),
        (Target("gpu", (10, 0)), ("triton",)),
        (Target("gpu", (8, 0)), ("triton",)),
        # Older than what Triton's products are for: the dispatch would not take it either.
        (Target("gpu", (7, 5)), ()),
    ],
    ids=str,
)
def test_what_runs_on_a_device_is_what_the_dispatch_would_take(
    target: Target, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "current_target", lambda platform=None: target)
    case = Case("square", 1, 1024, None, "bfloat16")
    found = set(kernel_speed.contenders(case, OPTIONS))
    assert found == {"xla, full product", "xla, bare product", *kernels}
