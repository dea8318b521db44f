"""Floor 2: where matrices, parts and heads live inside a parameter."""

from muonclip_jax.layouts.alignment import (
    resolve_muon_specs as resolve_muon_specs,
    resolve_specs as resolve_specs,
)
from muonclip_jax.layouts.attention import (
    AttentionLayout as AttentionLayout,
    Projection as Projection,
)
from muonclip_jax.layouts.decay import decay_mask as decay_mask
from muonclip_jax.layouts.describe import describe_labels as describe_labels
from muonclip_jax.layouts.fitting import normalize_spec as normalize_spec
from muonclip_jax.layouts.rules import (
    MatrixRules as MatrixRules,
    infer_dimension_numbers as infer_dimension_numbers,
    label_params as label_params,
)
from muonclip_jax.layouts.specs import (
    MatrixSpec as MatrixSpec,
    Split as Split,
    axes_tuple as axes_tuple,
)
