"""The weighted sum of each token's results, which lie in the order of its choices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor



def settle(results_SD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, slots: int, out_TD: Tensor) -> None:
    """out_TD[t] = sum over k of weights_TK[t, k] * results_SD[t * K + k], in float32, k after k.

    Choices of no slot (ids outside [0, slots)) count nothing and their results are not read.
    """
    (tokens, top_k), width = slot_ids_TK.shape, out_TD.shape[1]
    if tokens == 0:
        return
    columns = min(COLUMNS, triton.next_power_of_2(width))
    _settle[(tokens, triton.cdiv(width, columns))](
        results_SD,
        slot_ids_TK,
        weights_TK,
        out_TD,
        weights_TK.stride(0),
        weights_TK.stride(1),
        out_TD.stride(0),
        slots,
        width,
        top_k,
        columns,
    )


@triton.jit
def _settle(
    results_SD,
    ids_TK,
    weights_TK,
    out_TD,
    weight_token_stride,
    weight_choice_stride,
    out_stride,
    slots,
    D: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(ids_TK + token * K + k)
        answered = (slot >= 0) & (slot < slots)
        weight = tl.load(weights_TK + token * weight_token_stride + k * weight_choice_stride).to(tl.float32)
        result = results_SD + (token * K + k) * D + column
        values = tl.load(result, mask=answered & (column < D), other=0)
        total += tl.where(answered, weight, 0) * values.to(tl.float32)
    tl.store(out_TD + token * out_stride + column, total, mask=column < D)
