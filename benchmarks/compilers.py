"""The real TPU and GPU compilers, run on a CPU machine.

`libtpu` and the CUDA wheels bring XLA's compilers for TPU pods and for H200s; they compile for a
described topology, no device needed. What comes out is the optimised, partitioned program of one
device, its memory and, on a TPU, its operations. Their packages are the extras `tpu` and `cuda13`.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

# Read when the TPU compiler is loaded: the environment of a machine that has no TPU.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # There is no device to guard, and several processes may compile at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# From XLA's published device specifications.
H200 = Path(__file__).parent / "targets" / "h200.txtpb"


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """Returns the described devices of TPU slices such as "v5p:4x4x4" (64 of them)."""
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=slices
    )
    return list(described.devices)


def h200_devices(count: int) -> list[Any]:
    """Returns `count` described H200s of one host."""
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=H200.read_text(),
        topology=f"1x1x{count}",
    )
    return list(described.devices)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Inside, the library takes the decisions that it takes on `platform` ("tpu" or "gpu").

    Which dtype, which form of the iteration, loops or none: all of it goes by
    `jax.default_backend()`, which on the machine that compiles is the CPU.
    """
    with mock.patch.object(jax, "default_backend", return_value=platform):
        yield
