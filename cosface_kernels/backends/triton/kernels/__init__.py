"""The Triton kernels of backend `triton`, by stage; the modules beside this package launch them.

Letters as in `cosface_kernels.reference`: x (N, D), w (C, D), s (N,), cos_ij, z_ij = s_i cos_ij and
p_ij = e^{s_i (cos_ij - top_i) - log_sum_i}. Products accumulate in float32, logits never leave the chip, offsets
are 64-bit, and no result is made by atomics: what several programs contribute to goes into a slot each, summed in
order. Where classes are chosen, class j is row chosen_j of w, read and moved in place.

FLOPs and bytes, with b bytes a number, and what that predicts. Nothing here has been measured.

| kernel | FLOPs | bytes of w and dw from memory |
|---|---|---|
| row_norms | 2 C D | b C D |
| class_statistics | 2 N C D | b C D |
| logit_gradients | 2 N C D | b C D |
| embedding_gradients | 2 N C D | b C D |
| weight_gradients | 2 N C D | 2 b C D: reads w for the projection; writes dw |
| project_weight_gradients | 5 C D | 2 b C D, and 4 C D of sums in float32: after a product of the library |
| sgd_rows, adamw_rows | 10 C D | 2 b C D for w, 2 C D numbers of each state, C D of dw in float32 |
| sgd_whole_rows, adamw_whole_rows | 20 C D | as much, and as much once more from a cache to find the largest |

G is written once and read twice: 3 b N C bytes.

Predicted floor of a step in bfloat16, D = 512, from the makers' dense rates (A100 312 TFLOP/s and 2.0 TB/s, H100
SXM 989 and 3.35, B200 2,250 and 8): the larger of 8 N C D / rate and (6 D + 3 N) b C / bandwidth, where w is read
once for its norms, once forward and thrice backward, dw written once. Times are in ms.

| C | N | A100 | H100 | B200 | bound by |
|---|---|---|---|---|---|
| 1M | 256 | 3.8 | 2.3 | 1.0 | memory (tensor cores: 3.4, 1.1, 0.5) |
| 1M | 1024 | 13 | 4.2 | 1.9 | tensor cores (memory: 6.1, 3.7, 1.5) |
| 1M | 4096 | 54 | 17 | 7.5 | tensor cores (memory: 15, 9.2, 3.8) |
| 10M | 256 | 38 | 23 | 9.6 | memory (tensor cores: 34, 11, 4.7) |
| 10M | 1024 | 134 | 42 | 19 | tensor cores (memory: 61, 37, 15) |
| 10M | 4096 | 538 | 170 | 75 | tensor cores (memory: 154, 92, 38) |

Chunks that stay in L2 would spare up to half of those bytes, but take a launch every 5 us at N = 256, faster than
they can be made; `tiles.chunk_classes` makes them longer.

Where rows move inside backward, dw is written and read in float32 and w written in its place: 8 C D bytes more
and, for each state, 2 C D numbers.

The 2 N C exponentials, at 16 a clock and multiprocessor, take a twentieth of the tensor cores' time at D = 512 on
an A100 and an eighth on an H100, partly hidden under other programs' products.
"""

from cosface_kernels.backends.triton.kernels.backward import (
    embedding_gradients,
    finish_embedding_gradients,
    logit_gradients,
    normalize_embeddings,
    project_weight_gradients,
    weight_gradients,
)
from cosface_kernels.backends.triton.kernels.forward import (
    class_statistics,
    merge_statistics,
    row_norms,
)
from cosface_kernels.backends.triton.kernels.update import (
    adamw_rows,
    sgd_rows,
)
from cosface_kernels.backends.triton.kernels.whole_rows import (
    adamw_whole_rows,
    sgd_whole_rows,
)

__all__ = [
    "adamw_rows",
    "adamw_whole_rows",
    "class_statistics",
    "embedding_gradients",
    "finish_embedding_gradients",
    "logit_gradients",
    "merge_statistics",
    "normalize_embeddings",
    "project_weight_gradients",
    "row_norms",
    "sgd_rows",
    "sgd_whole_rows",
    "weight_gradients",
]
