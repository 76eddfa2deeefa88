"""What a row is while it travels between peers: itself, or its quantised values and behind them their scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.dispatch.transport import TRANSPORTS
from epbackend.kernels.triton.narrow import narrow
from epbackend.kernels.triton.widen import widen

ALIGNMENT = 16
"""Bytes: values and scales each begin at a multiple, so that rows move in the widest loads and stores."""

WORD = torch.int32
"""What a quantised row is made of, as far as the copying kernels can see."""


@dataclass(frozen=True)
class Wire:
    """For rows of `width` values of `dtype`."""

    transport: str
    width: int
    dtype: torch.dtype

    @property
    def row(self) -> tuple[int, torch.dtype]:
        """Elements and dtype of a travelling row."""
        if not self._scales:
            return self.width, self.dtype
        return (self._values_bytes + _aligned(4 * self._scales)) // WORD.itemsize, WORD

    def pack(self, hidden_TD: Tensor) -> Tensor:
        """The tokens' rows, ready to travel."""
        if not self._scales:
            return hidden_TD
        rows_TW = torch.empty(len(hidden_TD), self.row[0], dtype=WORD, device=hidden_TD.device)
        narrow(hidden_TD, *self._fields(rows_TW))
        return rows_TW

    def unpack(self, rows_CW: Tensor, counts_L: Tensor) -> Tensor:
        """rows_CD of those that have arrived, as many as the counts tell of."""
        if not self._scales:
            return rows_CW
        rows_CD = torch.empty(len(rows_CW), self.width, dtype=self.dtype, device=rows_CW.device)
        widen(*self._fields(rows_CW), rows_CD, counts_L)
        return rows_CD

    @property
    def _scales(self) -> int:
        return TRANSPORTS[self.transport].scales(self.width)

    @property
    def _values_bytes(self) -> int:
        return _aligned(self.width * TRANSPORTS[self.transport].dtype(self.dtype).itemsize)

    def _fields(self, rows_TW: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the values and of the scales."""
        bytes_TB = rows_TW.view(torch.uint8)
        scales = bytes_TB[:, self._values_bytes : self._values_bytes + 4 * self._scales]
        values = bytes_TB[:, : self.width].view(TRANSPORTS[self.transport].dtype(self.dtype))
        return values, scales.view(torch.float32)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
