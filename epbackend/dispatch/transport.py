"""In what form a row's hidden values travel to the experts: as they are, or in 8 bits with scales.

Quantised rows are restored on arrival, into their own dtype; experts of the same form quantise them again, to the same
values but for rounding. Partial sums always travel back in full: rounding errors of a row average out over the D
products that it enters, those of a sum go straight into the model's output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from epbackend.kernels import fp8, int8


class Transport(ABC):
    """One form. G scales a row."""

    @abstractmethod
    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Of the values that travel, for rows of `hidden`."""

    @abstractmethod
    def scales(self, hidden_size: int) -> int:
        """G."""

    @abstractmethod
    def quantised(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(values_TD, scale_TG float32); no scales where G is 0."""

    @abstractmethod
    def restored(self, values_TD: Tensor, scale_TG: Tensor, dtype: torch.dtype) -> Tensor:
        """hidden_TD of what `quantised` returned."""


class _Full(Transport):
    """As they are."""

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        return hidden

    def scales(self, hidden_size: int) -> int:
        return 0

    def quantised(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        return hidden_TD, None

    def restored(self, values_TD: Tensor, scale_TG: Tensor, dtype: torch.dtype) -> Tensor:
        return values_TD


class _Int8(Transport):
    """A scale for each row: off by at most 1/254 of the row's largest value."""

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        return torch.int8

    def scales(self, hidden_size: int) -> int:
        return 1

    def quantised(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        values_TD, scale_T = int8.quantize_rows(hidden_TD)
        return values_TD, scale_T[:, None]

    def restored(self, values_TD: Tensor, scale_TG: Tensor, dtype: torch.dtype) -> Tensor:
        return (values_TD * scale_TG).to(dtype)


class _Fp8(Transport):
    """e4m3 with a scale for each 128 values: off by at most 1/16 of a value, or 1/458752 of the largest of the 128."""

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        return fp8.FP8

    def scales(self, hidden_size: int) -> int:
        return -(-hidden_size // fp8.BLOCK)

    def quantised(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        return fp8.quantize_rows(hidden_TD)

    def restored(self, values_TD: Tensor, scale_TG: Tensor, dtype: torch.dtype) -> Tensor:
        scale_TD = scale_TG.repeat_interleave(fp8.BLOCK, 1)[:, : values_TD.shape[1]]
        return (values_TD.float() * scale_TD).to(dtype)


TRANSPORTS: dict[str, Transport] = {"full": _Full(), "int8": _Int8(), "fp8": _Fp8()}
