"""How the devices of a mesh share the orthogonalisation of a tree.

Left to the partitioner, a replicated matrix is orthogonalised by every device, and a sharded one
costs collectives in every Newton-Schulz step. Here the devices share the *matrices*: each gathers
whole ones, orthogonalises them alone and sends the results back.

1. `reading`, `mesh_shardings`: how the leaves are sharded, and a caller's options.
2. `blocks`, `planning`: which matrices there are and which devices work on which; from shapes,
   shardings and the mesh, without arrays.
3. `run` follows the plan, with the all-to-alls in `exchange`.
"""
