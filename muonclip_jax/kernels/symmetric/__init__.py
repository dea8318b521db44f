"""Products whose result is known to be symmetric, at half the work."""

from muonclip_jax.kernels.symmetric.dispatch import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    MATMUL_ADD as MATMUL_ADD,
)
from muonclip_jax.kernels.symmetric.operations import (
    gram as gram,
    matmul_add as matmul_add,
    symmetric_product as symmetric_product,
)
from muonclip_jax.kernels.symmetric.reference import (
    accumulator as accumulator,
    adjoint as adjoint,
    matmul as matmul,
)
