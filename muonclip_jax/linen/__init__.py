"""Flax Linen: attention that records its largest logits, their capture, and a train state.

A model that uses Flax's own attention modules needs no change:

    apply = muonclip_jax.linen.capture_max_logits(model.apply)
    logits, max_logits = apply({"params": params}, tokens)

A model may also record its own maxima, with
`attention_fn=muonclip_jax.linen.dot_product_attention` on the module. They are sown into
`intermediates` as `max_logits` at the path of the module whose query and key kernels the clip
scales. Under `nn.scan` and `nn.vmap` maxima are stacked like the kernels, if `variable_axes`
contains `intermediates` in addition to `params`.
"""

from muonclip_jax.linen.attention import (
    capture_max_logits as capture_max_logits,
    dot_product_attention as dot_product_attention,
)
from muonclip_jax.linen.train_state import TrainState as TrainState
