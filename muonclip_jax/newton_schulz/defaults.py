"""The defaults of Newton-Schulz, in one place.

`orthogonalize`, `scale_by_muon`, `muonclip`, `describe_cost` and the command line read them here.
`muon` alone differs: its coefficients are Optax's.
"""

#: The best result for its cost of all sets that nothing makes diverge (docs/performance.md).
DEFAULT_SET = "minimax4"
#: The cheaper form that is safe in its dtype.
DEFAULT_METHOD = "auto"
#: The rule of the platform (`precision.choose_dtype`).
DEFAULT_DTYPE = None
#: Smallest divisor of a matrix whose largest entry is near one; it guards the zero matrix alone.
DEFAULT_EPS = 1e-8
