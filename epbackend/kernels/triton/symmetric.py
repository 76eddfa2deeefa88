"""Rows between GPUs that reach each other's memory: kernels that store straight into the peers' buffers.

The phases of one exchange; at each arrow all ranks meet at a barrier:

       exchange_counts     every rank writes its row of counts into every rank's table
    -> recv_offsets,       the table says where each choice's row lies on its expert's rank,
       rows_at_receivers,
       dispatch            and there it is stored, in 8 bits if it travels so
    -> (experts)           on the rows where they lie, or in their own dtype again
       combine_send        each result is stored at the token's own rank, in the place of its choice
    -> combine_reduce      the weighted sum of a token's results, in float32 and in the order of its choices

A barrier also proves that every rank is done reading what is overwritten after it, so that one set of buffers serves
all layers: a rank reads the table, the rows and their choices before the barrier that follows `combine_send`, and sums
the results before it comes to the next barrier after which others store results.

Letters: T tokens, D hidden size, K choices of a token, S = T * K choices, R ranks, L slots of one rank, P = R * L slots
of all ranks, C rows of a receive buffer (or columns of the table: P + 1), B blocks of choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.launch import cdiv, named_launch, next_power_of_2
from epbackend.kernels.triton.permute import BLOCK, count_in_blocks, earlier_twins, load_slots, store_counts
from epbackend.kernels.triton.tiles import INTERPRETED, chip_of

ALIGNMENT = 128
"""Bytes: where each symmetric tensor begins, so that rows move in the widest loads and stores."""

POLLS_PER_S = 5_000 if INTERPRETED.value else 1_000_000
"""How often a waiting rank looks, roughly: an atomic operation on its own memory takes about a microsecond."""

ROWS, COLUMNS = 4, 1024
"""The most of a row block that one program moves at a time."""

PROGRAMS_PER_SM = 8


@dataclass(frozen=True)
class SymmetricTensor:
    """A tensor that every rank has, in memory that all of them can reach."""

    local: Tensor
    """This rank's own."""
    peer_ptrs_R: Tensor
    """int64, on the device: where each rank's lies in this rank's address space."""


@triton.jit
def peer_ptr(peer_ptrs_R, rank, local):
    """Pointer to the first element of a rank's tensor, of the type that `local` points to; `rank` may be a block."""
    address = tl.load(peer_ptrs_R + rank)
    return tl.multiple_of(address.to(tl.pointer_type(local.dtype.element_ty)), 16)


def barrier(
    signal_pad: SymmetricTensor,
    barriers_1: Tensor,
    timeout_report_2: Tensor,
    rank: int,
    layer: int,
    timeout_s: float,
) -> None:
    """No rank goes on before every rank has come, and what each stored before it came is there for all.

    Each rank counts the barriers, writes its number into its place at every rank, and waits until all places in its own
    memory have come as far. Numbers only grow, so nothing is ever reset, and a rank that is already at the next barrier
    does no harm.

    Args:
        signal_pad: int64 [R], zeros at first.
        barriers_1: int64, zero at first: how many barriers this rank has come to.
        timeout_report_2: int64, zeros at first, may be pinned host memory. When a rank does not come in time, its
            number + 1 and `layer` are written there and the GPU stops with an error: whatever follows would be wrong.
        rank: this rank.
        layer: only for the report.
        timeout_s: about how many seconds to wait.
    """
    ranks = len(signal_pad.local)
    _barrier[(1,)](
        peer_ptrs_R=signal_pad.peer_ptrs_R,
        signals_R=signal_pad.local,
        barriers_1=barriers_1,
        timeout_report_2=timeout_report_2,
        rank=rank,
        layer=layer,
        polls=max(1, int(timeout_s * POLLS_PER_S)),
        ranks=ranks,
        RANKS=next_power_of_2(ranks),
        num_warps=1,
    )


@named_launch
@triton.jit(do_not_specialize=["rank", "layer", "polls"])
def _barrier(
    peer_ptrs_R, signals_R, barriers_1, timeout_report_2, rank, layer, polls, ranks, RANKS: tl.constexpr
):
    """One program. The signals are atomics because those alone carry an order between GPUs (release and acquire)."""
    peer = tl.arange(0, RANKS)
    exists = peer < ranks
    number = tl.load(barriers_1) + 1
    tl.store(barriers_1, number)
    place = peer_ptr(peer_ptrs_R, tl.where(exists, peer, 0), signals_R) + rank
    tl.atomic_xchg(place, tl.zeros((RANKS,), tl.int64) + number, mask=exists, sem="release", scope="sys")
    nothing = tl.zeros((RANKS,), tl.int64)
    late = peer + 1
    while (tl.max(late) > 0) & (polls > 0):
        seen = tl.atomic_add(signals_R + peer, nothing, mask=exists, sem="acquire", scope="sys")
        late = tl.where(exists & (seen < number), peer + 1, 0)
        polls -= 1
    if tl.max(late) > 0:
        tl.store(timeout_report_2 + 1, layer.to(tl.int64))
        tl.store(timeout_report_2, tl.max(late).to(tl.int64))
        stop()


@triton.jit
def stop():
    """End all work of this process on the GPU with an error, once what was stored before has left the GPU."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


def exchange_counts(slot_ids_TK: Tensor, tokens: int, table: SymmetricTensor, rank: int) -> Tensor:
    """Write this rank's row of every rank's table (int32 [R, P + 1]): its counts of all slots, and `tokens`.

    Returns before_BP (int32): of each block of `permute.BLOCK` choices, how many earlier choices fell on each slot.
    """
    ranks, columns = table.local.shape
    totals_P, before_BP = count_in_blocks(slot_ids_TK.contiguous().view(-1), columns - 1)
    _exchange_counts[(ranks,)](
        totals_P=totals_P,
        peer_ptrs_R=table.peer_ptrs_R,
        table_RC=table.local,
        tokens=tokens,
        rank=rank,
        P=columns - 1,
        LANES=next_power_of_2(columns),
    )
    return before_BP


@named_launch
@triton.jit(do_not_specialize=["tokens", "rank"])
def _exchange_counts(totals_P, peer_ptrs_R, table_RC, tokens, rank, P, LANES: tl.constexpr):
    """One receiving rank: the row that this rank has there."""
    lane = tl.arange(0, LANES)
    totals = tl.load(totals_P + lane, mask=lane < P, other=0).to(tl.int32)
    row = peer_ptr(peer_ptrs_R, tl.program_id(0), table_RC) + rank * (P + 1)
    tl.store(row + lane, tl.where(lane < P, totals, tokens), mask=lane <= P)


@dataclass(frozen=True)
class RecvOffsets:
    """What the table of counts says to one rank."""

    bases_P: Tensor
    """int64: the row of this rank's first choice of each slot, on the slot's rank."""
    counts_L: Tensor
    """int64: how many rows of the window each of this rank's slots gets from all ranks together."""
    needs_R2: Tensor
    """int64: the rows that each rank gets in all, and the tokens that it has left."""


def recv_offsets(table_RC: Tensor, rank: int, slots: int, window: tuple[int, int]) -> RecvOffsets:
    """Where each choice's row lies on its expert's rank: sorted by slot, then by sending rank, then as it was sent.

    So the receiver needs no second sort. All ranks compute the same from the same table, which `exchange_counts` filled
    (C is P + 1). `window` is the range of rows that `counts_L` counts.

        counts_RP = [[2, 1], [3, 0]], one rank of two slots: slot 0 gets 2 rows from rank 0 and 3 from rank 1
        rows      = [0: slot 0 from rank 0, 0, 0: slot 0 from rank 1, 0, 0, 1: slot 1 from rank 0]
        bases_P   = [0, 5] on rank 0, [2, 6] on rank 1: where the first row that this rank sends to each slot lies
    """
    ranks, columns = table_RC.shape
    offsets = RecvOffsets(
        bases_P=torch.empty(columns - 1, dtype=torch.int64, device=table_RC.device),
        counts_L=torch.empty(slots, dtype=torch.int64, device=table_RC.device),
        needs_R2=torch.empty(ranks, 2, dtype=torch.int64, device=table_RC.device),
    )
    first, last = window
    _recv_offsets[(ranks,)](
        table_RC=table_RC,
        bases_P=offsets.bases_P,
        counts_L=offsets.counts_L,
        needs_R2=offsets.needs_R2,
        rank=rank,
        first=first,
        last=last,
        ranks=ranks,
        slots=slots,
        RANKS=next_power_of_2(ranks),
        LANES=next_power_of_2(slots),
    )
    return offsets


@named_launch
@triton.jit(do_not_specialize=["rank", "first", "last"])
def _recv_offsets(
    table_RC,
    bases_P,
    counts_L,
    needs_R2,
    rank,
    first,
    last,
    ranks,
    slots,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The slots of one receiving rank."""
    receiver = tl.program_id(0)
    sender = tl.arange(0, RANKS)[:, None]
    lane = tl.arange(0, LANES)
    row = table_RC + sender * (ranks * slots + 1)
    inside = (sender < ranks) & (lane < slots)[None, :]
    counts = tl.load(row + receiver * slots + lane[None, :], mask=inside, other=0)
    totals = tl.sum(counts, 0)
    earlier_senders = tl.sum(tl.where(sender < rank, counts, 0), 0)
    bases = tl.cumsum(totals) - totals + earlier_senders
    tl.store(bases_P + receiver * slots + lane, bases.to(tl.int64), mask=lane < slots)
    tokens = tl.load(table_RC + receiver * (ranks * slots + 1) + ranks * slots)
    tl.store(needs_R2 + 2 * receiver, tl.sum(totals).to(tl.int64))
    tl.store(needs_R2 + 2 * receiver + 1, tokens.to(tl.int64))
    if receiver == rank:
        store_counts(counts_L, totals, first, last, slots, LANES)


def rows_at_receivers(slot_ids_TK: Tensor, before_BP: Tensor, bases_P: Tensor) -> Tensor:
    """row_S (int64): the row of each choice on its slot's rank; -1 for choices of no slot."""
    row_S = torch.empty(slot_ids_TK.numel(), dtype=torch.int64, device=slot_ids_TK.device)
    if len(before_BP):
        ids_S = slot_ids_TK.contiguous().view(-1)
        _rows_at_receivers[(len(before_BP),)](
            ids_S=ids_S,
            before_BP=before_BP,
            bases_P=bases_P,
            row_S=row_S,
            S=len(ids_S),
            P=len(bases_P),
            BLOCK=BLOCK,
        )
    return row_S


@named_launch
@triton.jit(do_not_specialize=["S"])
def _rows_at_receivers(ids_S, before_BP, bases_P, row_S, S, P, BLOCK: tl.constexpr):
    """One block of choices."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, P)
    known = slot < P
    base = tl.load(bases_P + slot, mask=known, other=0)
    before = tl.load(before_BP + block.to(tl.int64) * P + slot, mask=known, other=0)
    row = base + before + earlier_twins(slot, BLOCK)
    tl.store(row_S + choice, tl.where(known, row, -1), mask=choice < S)


def dispatch(
    hidden_TD: Tensor,
    slot_ids_TK: Tensor,
    row_S: Tensor,
    first_row: int,
    rows: SymmetricTensor,
    choice_of_row: SymmetricTensor,
    first_choice: int,
    slots: int,
) -> None:
    """Store each token's row into the receive buffers of the ranks of its experts, once for each choice.

    Args:
        hidden_TD: the tokens' rows.
        slot_ids_TK: the slots of their choices.
        row_S: int64, the row of each choice on its slot's rank, from `rows_at_receivers`.
        first_row: only choices travel whose row lies in the window from here on, as long as the receive buffer.
        rows: the receive buffers, [C, D].
        choice_of_row: int64 [C]: the choice that each row serves, counted over all ranks.
        first_choice: the number of this rank's first choice among all ranks' choices.
        slots: L, of each rank.
    """
    (tokens, top_k), (capacity, width) = slot_ids_TK.shape, rows.local.shape
    if tokens == 0:
        return
    columns = min(COLUMNS, next_power_of_2(width))
    _dispatch[(tokens, cdiv(width, columns))](
        hidden_TD=hidden_TD,
        ids_TK=slot_ids_TK,
        row_S=row_S,
        rows_R=rows.peer_ptrs_R,
        rows_CD=rows.local,
        choice_of_row_R=choice_of_row.peer_ptrs_R,
        choice_of_row_C=choice_of_row.local,
        token_stride=hidden_TD.stride(0),
        first_row=first_row,
        first_choice=first_choice,
        capacity=capacity,
        slots=slots,
        D=width,
        K=top_k,
        CHOICES=next_power_of_2(top_k),
        COLUMNS=columns,
    )


@named_launch
@triton.jit(do_not_specialize=["first_row", "first_choice"])
def _dispatch(
    hidden_TD,
    ids_TK,
    row_S,
    rows_R,
    rows_CD,
    choice_of_row_R,
    choice_of_row_C,
    token_stride,
    first_row,
    first_choice,
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
    row = tl.load(row_S + choice, mask=nth < K, other=-1) - first_row
    sent = (row >= 0) & (row < capacity)
    rank = tl.load(ids_TK + choice, mask=sent, other=0) // slots
    if tl.program_id(1) == 0:
        tl.store(peer_ptr(choice_of_row_R, rank, choice_of_row_C) + row, first_choice + choice, mask=sent)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(hidden_TD + token * token_stride + column, mask=column < D)
    start = peer_ptr(rows_R, rank, rows_CD) + row * D
    inside = sent[:, None] & (column < D)[None, :]
    tl.store(
        start[:, None] + column[None, :], tl.broadcast_to(values[None, :], CHOICES, COLUMNS), mask=inside
    )


def combine_send(
    rows_SD: Tensor, counts_L: Tensor, choice_of_row_S: Tensor, results: SymmetricTensor
) -> None:
    """Store each of the first `counts_L.sum()` rows at its token's own rank, in the place of its choice.

    `results` is [tokens * K, D] on each rank, `choice_of_row_S` as `dispatch` wrote it. As many programs as fit on the
    chip share the rows, since only the device knows how many there are.
    """
    (choices, width), columns = results.local.shape, min(COLUMNS, next_power_of_2(rows_SD.shape[1]))
    _combine_send[(chip_of(rows_SD.device).sms * PROGRAMS_PER_SM,)](
        rows_SD=rows_SD,
        counts_L=counts_L,
        choice_of_row_S=choice_of_row_S,
        results_R=results.peer_ptrs_R,
        results_CD=results.local,
        row_stride=rows_SD.stride(0),
        slots=len(counts_L),
        choices=choices,
        D=width,
        LANES=next_power_of_2(len(counts_L)),
        ROWS=ROWS,
        COLUMNS=columns,
    )


@named_launch
@triton.jit
def _combine_send(
    rows_SD,
    counts_L,
    choice_of_row_S,
    results_R,
    results_CD,
    row_stride,
    slots,
    choices,
    D: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every so many blocks of ROWS rows and COLUMNS columns."""
    lane = tl.arange(0, LANES)
    rows = tl.sum(tl.load(counts_L + lane, mask=lane < slots, other=0))
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    blocks = (rows + ROWS - 1) // ROWS * column_blocks
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block // column_blocks * ROWS + tl.arange(0, ROWS).to(tl.int64)
        column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        choice = tl.load(choice_of_row_S + row, mask=row < rows, other=0)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        values = tl.load(rows_SD + row[:, None] * row_stride + column[None, :], mask=inside)
        start = peer_ptr(results_R, choice // choices, results_CD) + choice % choices * D
        tl.store(start[:, None] + column[None, :], values.to(results_CD.dtype.element_ty), mask=inside)


def combine_reduce(
    results_SD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, slots: int, out_TD: Tensor
) -> None:
    """out_TD[t] = sum over k of weights_TK[t, k] * results_SD[t * K + k], in float32, k after k.

    Choices of no slot (ids outside [0, slots)) count nothing and their results are not read.
    """
    (tokens, top_k), width = slot_ids_TK.shape, out_TD.shape[1]
    if tokens == 0:
        return
    columns = min(COLUMNS, next_power_of_2(width))
    _combine_reduce[(tokens, cdiv(width, columns))](
        results_SD=results_SD,
        ids_TK=slot_ids_TK,
        weights_TK=weights_TK,
        out_TD=out_TD,
        weight_token_stride=weights_TK.stride(0),
        weight_choice_stride=weights_TK.stride(1),
        out_stride=out_TD.stride(0),
        slots=slots,
        D=width,
        K=top_k,
        COLUMNS=columns,
    )


@named_launch
@triton.jit
def _combine_reduce(
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
