"""The arguments of an aclnn call as Python sees them: tensors over the same bytes, lists, numbers, text."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int64, c_uint8, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TENSOR, LIST, INTS, SCALAR = 0x7E4501, 0x7E4502, 0x7E4503, 0x7E4504
"""`Kind` of native/objects.cpp."""

DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}
"""aclDataType of the types that occur."""

PLAIN_FORMATS = {-1, 0, 2, 30, 47}
"""aclFormat of tensors without a layout of their own: undefined, NCHW, ND, NCDHW, NCL."""

NZ = 29
"""FRACTAL_NZ (see formats.py)."""


class RefusedError(Exception):
    """The call breaks a documented limit, or leaves what is emulated."""


class Handles:
    """Reads the descriptors of native/objects.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, result in {
            "object_kind": c_int64,
            "tensor_dims": c_uint64,
            "tensor_shape": POINTER(c_int64),
            "tensor_strides": POINTER(c_int64),
            "tensor_storage_dims": c_uint64,
            "tensor_storage": POINTER(c_int64),
            "tensor_offset": c_int64,
            "tensor_dtype": ctypes.c_int32,
            "tensor_format": ctypes.c_int32,
            "tensor_data": c_void_p,
            "list_length": c_uint64,
            "ints_length": c_uint64,
            "ints_values": POINTER(c_int64),
            "scalar_dtype": ctypes.c_int32,
            "scalar_bytes": c_void_p,
        }.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, [c_void_p]
        library.list_item.restype, library.list_item.argtypes = c_void_p, [c_void_p, c_uint64]

    def tensor(self, handle: int | None) -> Tensor | None:
        """A CPU tensor over the bytes of the device tensor; of FRACTAL_NZ its tiles, in five dimensions."""
        if not handle:
            return None
        self._expect(handle, TENSOR, "a tensor")
        read = self._library
        dims = read.tensor_dims(handle)
        shape, strides = read.tensor_shape(handle)[:dims], read.tensor_strides(handle)[:dims]
        storage = read.tensor_storage(handle)[: read.tensor_storage_dims(handle)]
        code, layout = read.tensor_dtype(handle), read.tensor_format(handle)
        if code not in DTYPES:
            raise RefusedError(f"a tensor of aclDataType {code} is not emulated")
        if layout == NZ:
            if len(storage) != 5 or read.tensor_offset(handle):
                raise RefusedError("a part of a FRACTAL_NZ tensor is not emulated")
            shape, strides = storage, [math.prod(storage[place + 1 :]) for place in range(5)]
        elif layout not in PLAIN_FORMATS:
            raise RefusedError(f"a tensor of aclFormat {layout} is not emulated")
        return over_bytes(
            read.tensor_data(handle),
            shape,
            strides,
            read.tensor_offset(handle),
            DTYPES[code],
            math.prod(storage),
        )

    def tensors(self, handle: int | None) -> list[Tensor]:
        if not handle:
            return []
        self._expect(handle, LIST, "a list of tensors")
        items = [self._library.list_item(handle, index) for index in range(self._library.list_length(handle))]
        return [tensor for tensor in map(self.tensor, items) if tensor is not None]

    def ints(self, handle: int | None) -> list[int]:
        if not handle:
            return []
        self._expect(handle, INTS, "a list of integers")
        return self._library.ints_values(handle)[: self._library.ints_length(handle)]

    def scalar(self, handle: int) -> int | float | bool:
        self._expect(handle, SCALAR, "a scalar")
        kind = {torch.int64: c_int64, torch.float64: c_double, torch.bool: c_uint8}
        dtype = DTYPES[self._library.scalar_dtype(handle)]
        return ctypes.cast(self._library.scalar_bytes(handle), POINTER(kind[dtype]))[0]

    def _expect(self, handle: int, kind: int, what: str) -> None:
        if self._library.object_kind(handle) != kind:
            raise RefusedError(
                f"an argument is not {what}: torch_npu passes other arguments than the emulation expects"
            )


def over_bytes(
    address: int | None, shape: list[int], strides: list[int], offset: int, dtype: torch.dtype, storage: int
) -> Tensor:
    """A CPU tensor on the memory at `address`, which holds `storage` elements."""
    if 0 in shape or not address:
        return torch.empty(shape, dtype=dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if offset + span > storage:
        raise RefusedError(f"a view of shape {shape} ends past its storage of {storage} elements")
    memory = (ctypes.c_char * ((offset + span) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(shape, strides, offset)


@dataclass(frozen=True)
class Argument:
    """How one letter of an operator's signature is passed in C and read in Python."""

    ctype: Any
    read: Callable[[Handles, Any], Any]


ARGUMENTS = {
    "T": Argument(c_void_p, Handles.tensor),
    "L": Argument(c_void_p, Handles.tensors),
    "I": Argument(c_void_p, Handles.ints),
    "S": Argument(c_void_p, Handles.scalar),
    "i": Argument(c_int64, lambda _, value: value),
    "b": Argument(c_bool, lambda _, value: value),
    "d": Argument(c_double, lambda _, value: value),
    "f": Argument(c_float, lambda _, value: value),
    "s": Argument(c_char_p, lambda _, value: (value or b"").decode()),
}
