"""The Optax transformations; `muonclip_jax` has their public names.

1. `_scale_by_muon`: momentum, then the polar factor of every matrix, which `_placing` applies.
2. `_matrix_axes`: reductions along rows and columns, the scale by shape. `_variants`: NorMuon,
   Hyperball, and weight decay with options.
3. `_qk_clip`, `_accumulate`, and `_metrics` with its `_figures`.
4. `_checks` of arguments, gradients and states; `_placing`: the matrices and shardings of a tree.
"""
