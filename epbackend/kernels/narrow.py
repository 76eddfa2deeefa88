"""Rows in 8 bits for their way between ranks: float8 with a scale for each 128 values, int8 with one for each row.

In plain torch operators. Values and scales may be views of wider rows.
"""

from __future__ import annotations

from torch import Tensor

from epbackend.kernels import fp8, int8


class TorchNarrowing:
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def narrow(self, rows_TD: Tensor, values_TD: Tensor, scale_TG: Tensor) -> None:
        if values_TD.dtype == fp8.FP8:
            narrow_TD, narrow_TG = fp8.quantize_rows(rows_TD)
        else:
            narrow_TD, scale_T = int8.quantize_rows(rows_TD)
            narrow_TG = scale_T.unsqueeze(1)
        values_TD.copy_(narrow_TD)
        scale_TG.copy_(narrow_TG)

    def widen(self, values_TD: Tensor, scale_TG: Tensor, out_TD: Tensor) -> None:
        if values_TD.dtype == fp8.FP8:
            scale_TG = scale_TG.repeat_interleave(fp8.BLOCK, 1)[:, : values_TD.shape[1]]
        out_TD.copy_(values_TD.float() * scale_TG)
