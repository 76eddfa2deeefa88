"""Store each token's row into the receive buffers of the ranks of its experts, once for each choice."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.peer.mirror import Mirror, reach

COLUMNS = 1024


def send(
    hidden_TD: Tensor,
    slot_ids_TK: Tensor,
    row_S: Tensor,
    first: int,
    rows: Mirror,
    sources: Mirror,
    place: int,
    slots: int,
) -> None:
    """Send the choices whose row lies in the window from `first` on, as long as the receive buffer.

    `rows` are the receive buffers [C, D], `sources` (int64 [C]) say whom each row comes from: `place` + choice, where
    `place` is the number of this rank's first choice among all ranks' choices.
    """
    (tokens, top_k), (capacity, width) = slot_ids_TK.shape, rows.mine.shape
    if tokens == 0:
        return
    columns = min(COLUMNS, triton.next_power_of_2(width))
    _send[(tokens, triton.cdiv(width, columns))](
        hidden_TD,
        slot_ids_TK,
        row_S,
        rows.addresses_R,
        rows.mine,
        sources.addresses_R,
        sources.mine,
        hidden_TD.stride(0),
        first,
        place,
        capacity,
        slots,
        width,
        top_k,
        triton.next_power_of_2(top_k),
        columns,
    )


@triton.jit(do_not_specialize=["first", "place"])
def _send(
    hidden_TD,
    ids_TK,
    row_S,
    rows_R,
    rows_CD,
    sources_R,
    sources_C,
    token_stride,
    first,
    place,
    capacity,
    slots,
    D: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's columns, read once and stored for each of its choices."""
    token = tl.program_id(0).to(tl.int64)
    nth = tl.arange(0, CHOICES)
    choice = token * K + nth
    row = tl.load(row_S + choice, mask=nth < K, other=-1) - first
    sent = (row >= 0) & (row < capacity)
    rank = tl.load(ids_TK + choice, mask=sent, other=0) // slots
    if tl.program_id(1) == 0:
        tl.store(reach(sources_R, rank, sources_C) + row, place + choice, mask=sent)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(hidden_TD + token * token_stride + column, mask=column < D)
    start = reach(rows_R, rank, rows_CD) + row * D
    inside = sent[:, None] & (column < D)[None, :]
    tl.store(
        start[:, None] + column[None, :], tl.broadcast_to(values[None, :], CHOICES, COLUMNS), mask=inside
    )
