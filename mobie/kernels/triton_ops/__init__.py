"""The kernels, in Triton: the operations of `mobie.kernels.twins`, same names and meanings, on NVIDIA GPUs.

With `TRITON_INTERPRET=1`, set before this is imported, they run in Triton's interpreter on the CPU instead.
"""

from mobie.kernels.triton_ops.binary_grouped import binary_grouped
from mobie.kernels.triton_ops.binary_linear import binary_linear
from mobie.kernels.triton_ops.dense_grouped import dense_grouped
from mobie.kernels.triton_ops.group_pairs import group_pairs
from mobie.kernels.triton_ops.panel import panel
from mobie.kernels.triton_ops.rms_norm import rms_norm
from mobie.kernels.triton_ops.route import route
from mobie.kernels.triton_ops.swiglu import reduce_pairs, swiglu

__all__ = [
    "binary_grouped",
    "binary_linear",
    "dense_grouped",
    "group_pairs",
    "panel",
    "reduce_pairs",
    "rms_norm",
    "route",
    "swiglu",
]
