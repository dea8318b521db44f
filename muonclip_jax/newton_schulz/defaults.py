"""The defaults of Newton-Schulz, in one place.

All functions and the command line read them here; the coefficients of `muon` alone are Optax's.
"""

DEFAULT_SET = "minimax4"  # the best result for its cost of all sets that nothing makes diverge
DEFAULT_METHOD = "auto"  # the cheaper form that is safe in its dtype
DEFAULT_DTYPE = None  # the rule of the platform
DEFAULT_EPS = 1e-8  # the smallest divisor of a matrix whose largest entry is near one
