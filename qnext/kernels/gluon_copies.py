"""What kernels in Gluon share: descriptors of tensors for the copy engine."""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def describe(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """Descriptor of a 16-bit tensor for copies of blocks of as many dimensions.

    The last dimension is contiguous, and the others' strides are multiples of 16 bytes.
    """
    layout = gl.NVMMASharedLayout(128, 16, len(block))
    return TensorDescriptor.from_tensor(tensor, list(block), layout=layout)
