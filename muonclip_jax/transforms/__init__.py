"""The Optax transformations; `muonclip_jax` has their public names.

1. `_scale_by_muon`: momentum, then the polar factor of every matrix by `_orthogonalize_updates`.
2. `_matrix_axes`: reductions along rows and columns, the scale by shape. `_variants`: NorMuon,
   Hyperball, and weight decay with options.
3. `_qk_clip`, `_accumulate`, and `_metrics` with its `_figures`.
4. `_states`: where states are on a mesh, and errors for states of other transformations.
"""
