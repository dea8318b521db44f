"""The Optax transformations, one file each; `muonclip_jax` has their public names.

1. `_scale_by_muon`: momentum. `_orthogonalize_updates`: the polar factor of every matrix.
2. `_matrix_axes`: reductions along rows and columns, the scale by shape. `_variants`: NorMuon,
   Hyperball, and weight decay with options.
3. `_qk_clip`, `_accumulate`, and `_metrics` with its `_figures`.
4. `_checks` of arguments, gradients and states; `_placing` of states on a mesh.
"""
