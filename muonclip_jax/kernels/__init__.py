"""Floor 1: named array operations, each with its XLA meaning."""
