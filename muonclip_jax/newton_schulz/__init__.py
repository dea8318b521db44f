"""The polar factor of a matrix by Newton-Schulz: coefficients, plan, iterations."""

from muonclip_jax.newton_schulz._orthogonalize import (
    apply_polar as apply_polar,
    orthogonalize as orthogonalize,
)
from muonclip_jax.newton_schulz.plan import PolarPlan as PolarPlan, plan_polar as plan_polar
