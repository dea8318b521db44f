"""The commands of `python -m muonclip_jax`."""
