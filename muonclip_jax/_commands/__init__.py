"""Floor 7: what `python -m muonclip_jax` does."""
