"""How a matrix is handed to a kernel: by the copy engine's descriptor (TMA), or by a pointer."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TMA_BYTES = 16


def aligned(tensor: Tensor) -> bool:
    """Whether TMA can read the tensor: rows contiguous, and base and row stride multiples of 16 bytes."""
    strides = [stride * tensor.itemsize for stride in tensor.stride()[:-1]]
    return tensor.stride(-1) == 1 and not any(at % TMA_BYTES for at in (tensor.data_ptr(), *strides))


def matrix(tensor: Tensor, block: tuple[int, ...], tma: bool) -> Tensor | TensorDescriptor:
    """`tensor` as a kernel takes it, in blocks of that shape; a descriptor is made on the host and passed by value."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor
