"""The bytes of a row on its way to the experts: its hidden values, as they are or in 8 bits, and its choices.

Rows in 8 bits get their own dtype back on arrival; experts of the same form quantize them again, to the same values but
for rounding. Partial sums always travel back in full: rounding errors of a row average out over the D products that it
enters, those of a sum go straight into the model's output.

A row, from its first byte on; each of the three parts begins at a multiple of the alignment:

    K int32 slot ids, K float32 weights  |  float32 scales  |  D values in the dispatch dtype

so that decoding makes views, and copies nothing but the ids and what has to be dequantized. With its choices a row is
one token for one collective. Without them (`top_k` 0) it is one choice, stored straight where its expert reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from epbackend.kernels import Kernels, fp8


@dataclass(frozen=True)
class DispatchDtype:
    """One form of hidden values."""

    values: torch.dtype | None
    """What travels; None: the rows' own dtype."""
    scales: Callable[[int], int]
    """How many scales (float32) a row of so many values has."""

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Of the values that travel, for rows of `hidden`."""
        return self.values or hidden


DISPATCH_DTYPES = {
    "full": DispatchDtype(None, lambda width: 0),
    "int8": DispatchDtype(torch.int8, lambda width: 1),
    "fp8": DispatchDtype(fp8.FP8, lambda width: -(-width // fp8.BLOCK)),
}
"""Off by at most: int8 1/254 of the row's largest value; fp8 1/16 of a value, or 1/458752 of the largest of its 128."""


class Fields(NamedTuple):
    """Views of encoded rows."""

    ids_TK: Tensor
    weights_TK: Tensor
    scales_TX: Tensor
    values_TD: Tensor


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one layer are encoded.

    >>> RowFormat(7168, torch.bfloat16, "fp8", top_k=8).bytes
    7456
    """

    hidden_size: int
    """D."""
    dtype: torch.dtype
    """Of the hidden states."""
    dispatch_dtype: str = "full"
    top_k: int = 0
    """K: choices whose ids and weights travel in the row."""
    alignment: int = 8
    """Bytes, at least those of the widest field."""

    @classmethod
    def of(cls, hidden_TD: Tensor, slot_ids_TK: Tensor, dispatch_dtype: str) -> RowFormat:
        """Of tokens that travel with their choices."""
        return cls(hidden_TD.shape[1], hidden_TD.dtype, dispatch_dtype, slot_ids_TK.shape[1])

    @property
    def quantized(self) -> bool:
        return self.dispatch_dtype != "full"

    @property
    def bytes(self) -> int:
        """B: bytes of one encoded row."""
        return self._starts[2] + self._aligned(self.hidden_size * self._values_dtype.itemsize)

    def encode(
        self,
        kernels: Kernels,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
        tokens: int | None = None,
    ) -> Tensor:
        """bytes_TB (uint8); with `tokens` padded to so many rows, the padding choosing no slot (id -1)."""
        count = len(hidden_TD)
        bytes_TB = hidden_TD.new_empty(count if tokens is None else tokens, self.bytes, dtype=torch.uint8)
        fields = self.fields(bytes_TB)
        fields.ids_TK[:count], fields.weights_TK[:count] = slot_ids_TK, weights_TK
        fields.ids_TK[count:] = -1
        if self.quantized:
            kernels.quantize(hidden_TD, fields.values_TD[:count], fields.scales_TX[:count])
        else:
            fields.values_TD[:count] = hidden_TD
        return bytes_TB

    def decode(self, kernels: Kernels, bytes_TB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden_TD, slot_ids_TK, weights_TK) of encoded rows; weights, and hidden sent in full, are views of them."""
        fields = self.fields(bytes_TB)
        hidden_TD = fields.values_TD
        if self.quantized:
            hidden_TD = bytes_TB.new_empty(len(bytes_TB), self.hidden_size, dtype=self.dtype)
            kernels.dequantize(fields.values_TD, fields.scales_TX, hidden_TD)
        return hidden_TD, fields.ids_TK.long(), fields.weights_TK

    def fields(self, bytes_TB: Tensor) -> Fields:
        """The parts of encoded rows, to fill or to read."""
        weights, (choices_end, scales_start, values_start) = 4 * self.top_k, self._starts
        values_bytes = self.hidden_size * self._values_dtype.itemsize
        return Fields(
            bytes_TB[:, :weights].view(torch.int32),
            bytes_TB[:, weights:choices_end].view(torch.float32),
            bytes_TB[:, scales_start : scales_start + 4 * self._scales].view(torch.float32),
            bytes_TB[:, values_start : values_start + values_bytes].view(self._values_dtype),
        )

    @property
    def _scales(self) -> int:
        return DISPATCH_DTYPES[self.dispatch_dtype].scales(self.hidden_size)

    @property
    def _values_dtype(self) -> torch.dtype:
        return DISPATCH_DTYPES[self.dispatch_dtype].dtype(self.dtype)

    @property
    def _starts(self) -> tuple[int, int, int]:
        """Where the choices end, and where scales and values start."""
        choices = 8 * self.top_k
        scales = self._aligned(choices)
        return choices, scales, scales + self._aligned(4 * self._scales)

    def _aligned(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment
