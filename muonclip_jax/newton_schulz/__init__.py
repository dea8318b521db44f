"""Floor 2: the polar factor of a matrix by Newton-Schulz: coefficients, iterations, oracle."""

from muonclip_jax.newton_schulz._orthogonalize import (
    apply_polar as apply_polar,
    orthogonalize as orthogonalize,
)
from muonclip_jax.newton_schulz.coefficients import (
    ALIASES as ALIASES,
    COEFFICIENT_SETS as COEFFICIENT_SETS,
    CoefficientSet as CoefficientSet,
)
from muonclip_jax.newton_schulz.defaults import (
    DEFAULT_DTYPE as DEFAULT_DTYPE,
    DEFAULT_EPS as DEFAULT_EPS,
    DEFAULT_METHOD as DEFAULT_METHOD,
    DEFAULT_SET as DEFAULT_SET,
)
from muonclip_jax.newton_schulz.generators import (
    cans_coefficients as cans_coefficients,
    optimal_odd_polynomial as optimal_odd_polynomial,
    polar_express_coefficients as polar_express_coefficients,
    with_safety_factor as with_safety_factor,
)
from muonclip_jax.newton_schulz.plan import (
    PolarPlan as PolarPlan,
    decide_platform as decide_platform,
    plan_polar as plan_polar,
)
from muonclip_jax.newton_schulz.precision import NS_DTYPES as NS_DTYPES, NS_METHODS as NS_METHODS
from muonclip_jax.newton_schulz.preconditioning import PRECONDITIONINGS as PRECONDITIONINGS
from muonclip_jax.newton_schulz.restarts import choose_restarts as choose_restarts
