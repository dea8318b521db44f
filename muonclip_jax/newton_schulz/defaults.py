"""The defaults of Newton-Schulz: all functions and the command line read them here."""

# Of five sets at equal settings it trained to the lowest loss (docs/settings.md); and 16 bits round
# it least.
DEFAULT_SET = "keller_jordan"
DEFAULT_METHOD = "auto"  # the cheaper form that is safe in its dtype
DEFAULT_DTYPE = None  # the rule of the platform
DEFAULT_EPS = 1e-8  # the smallest divisor of a matrix whose largest entry is near one
