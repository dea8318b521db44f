"""The polar factor of a matrix by Newton-Schulz: coefficients, plan, iterations."""

from muonclip_jax.newton_schulz._orthogonalize import (
    apply_polar as apply_polar,
    apply_polar_by_columns as apply_polar_by_columns,
    orthogonalize as orthogonalize,
)
from muonclip_jax.newton_schulz.coefficients import (
    ALIASES as ALIASES,
    COEFFICIENT_SETS as COEFFICIENT_SETS,
    DEFAULT_DTYPE as DEFAULT_DTYPE,
    DEFAULT_EPS as DEFAULT_EPS,
    DEFAULT_METHOD as DEFAULT_METHOD,
    DEFAULT_SET as DEFAULT_SET,
    Coefficients as Coefficients,
)
from muonclip_jax.newton_schulz.plan import (
    NS_DTYPES as NS_DTYPES,
    NS_METHODS as NS_METHODS,
    PRECONDITIONINGS as PRECONDITIONINGS,
    PolarPlan as PolarPlan,
    decide_platform as decide_platform,
    plan_polar as plan_polar,
)
