"""The operation "per-head maxima": the largest logit of each head, over the pairs attended to.

    S_h = max over b, t, s attended of  scale q[b, t, h] . k[b, s, h]

`xla` says what it means, `pallas_gpu` and `pallas_tpu` are kernels for it, `pallas` launches them
on one device or many, and `dispatch` goes by the name.
"""

from muonclip_jax.kernels.max_logits.dispatch import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    max_logits as max_logits,
)
from muonclip_jax.kernels.max_logits.xla import (
    block_logits as block_logits,
    dot_precision as dot_precision,
    known_product as known_product,
    least_block as least_block,
)
