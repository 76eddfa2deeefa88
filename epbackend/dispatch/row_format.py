"""In what form a row's hidden values travel to the experts: as they are, or in 8 bits with scales.

Rows in 8 bits get their own dtype back on arrival; experts of the same form quantize them again, to the same values but
for rounding. Partial sums always travel back in full: rounding errors of a row average out over the D products that it
enters, those of a sum go straight into the model's output.

One byte row a token: its choices, their weights and its hidden state, so that one collective moves all three.

Layout of a row: K int32 slot ids, K float32 weights, G float32 scales, D values in the transport's dtype. The row is
padded to 8 bytes, which keeps every field aligned, so that unpacking makes views and copies nothing but the ids and
what has to be dequantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.kernels import Kernels, fp8


@dataclass(frozen=True)
class Transport:
    """One form."""

    values: torch.dtype | None
    """What travels; None: the rows' own dtype."""
    scales: Callable[[int], int]
    """G: how many scales (float32) a row of so many values has."""

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Of the values that travel, for rows of `hidden`."""
        return self.values or hidden


TRANSPORTS = {
    "full": Transport(None, lambda width: 0),
    "int8": Transport(torch.int8, lambda width: 1),
    "fp8": Transport(fp8.FP8, lambda width: -(-width // fp8.BLOCK)),
}
"""Off by at most: int8 1/254 of the row's largest value; fp8 1/16 of a value, or 1/458752 of the largest of its 128."""


@dataclass(frozen=True)
class RowFormat:
    """How the tokens of one layer are packed."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    """Of the hidden states."""
    transport: str = "full"

    @classmethod
    def of(cls, hidden_TD: Tensor, slot_ids_TK: Tensor, transport: str) -> RowFormat:
        return cls(hidden_TD.shape[1], slot_ids_TK.shape[1], hidden_TD.dtype, transport)

    @property
    def bytes(self) -> int:
        """B: bytes of one packed token."""
        _, _, end = self._ends
        return -(-end // 8) * 8

    def pack(
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
        ids, weights, scales, values = self._fields(bytes_TB)
        ids[:count], weights[:count] = slot_ids_TK, weights_TK
        ids[count:] = -1
        if self.transport == "full":
            values[:count] = hidden_TD
        else:
            kernels.quantize(hidden_TD, values[:count], scales[:count])
        return bytes_TB

    def unpack(self, kernels: Kernels, bytes_TB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden_TD, slot_ids_TK, weights_TK) of packed rows; weights, and hidden sent in full, are views of them."""
        ids, weights, scales, values = self._fields(bytes_TB)
        hidden_TD = values
        if self.transport != "full":
            hidden_TD = bytes_TB.new_empty(len(bytes_TB), self.hidden_size, dtype=self.dtype)
            kernels.dequantize(values, scales, hidden_TD)
        return hidden_TD, ids.long(), weights

    @property
    def _ends(self) -> tuple[int, int, int]:
        """Where weights, scales and values end."""
        transport = TRANSPORTS[self.transport]
        weights = 8 * self.top_k
        scales = weights + 4 * transport.scales(self.hidden_size)
        return weights, scales, scales + self.hidden_size * transport.dtype(self.dtype).itemsize

    def _fields(self, bytes_TB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, scales, values = self._ends
        return (
            bytes_TB[:, : 4 * self.top_k].view(torch.int32),
            bytes_TB[:, 4 * self.top_k : weights].view(torch.float32),
            bytes_TB[:, weights:scales].view(torch.float32),
            bytes_TB[:, scales:values].view(TRANSPORTS[self.transport].dtype(self.dtype)),
        )
