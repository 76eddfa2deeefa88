"""Rows between GPUs that reach each other's memory: kernels that store straight into the peers' buffers.

The phases of one exchange; at each arrow all ranks meet (`meet`):

       counts              every rank writes its row of counts into every rank's table
    -> layout, send        the table says where each choice's row lies on its expert's rank, and there it is stored,
                           in 8 bits if it travels so (`narrow`)
    -> (experts)           on the rows where they lie, or in their own dtype again (`widen`)
       give_back           each result is stored at the token's own rank, in the place of its choice
    -> settle              the weighted sum of a token's results, in float32 and in the order of its choices

A meeting also proves that every rank is done reading what comes to be overwritten after it, so that one set of buffers
serves all layers: a rank reads the table, the rows and their sources before the meeting that follows `give_back`, and
sums the results before it comes to the next meeting after which others store results.

A tensor that every rank has, in memory that all of them can reach.

All ranks meet: none goes on before every rank has come, and what each stored before it came is there for all.

Each rank counts the meetings, writes its number into its place at every rank, and waits until all places in its own
memory have come as far. Numbers only grow, so nothing is ever reset, and a rank that is already at the next meeting
does no harm.

Every rank learns how many choices of every rank fell on each slot.

Where each choice's row lies on its expert's rank: sorted by slot, then by sending rank, then in the sender's order.

    counts_RP = [[2, 1], [3, 0]], one rank of two slots: slot 0 gets 2 rows from rank 0 and 3 from rank 1
    rows      = [0: slot 0 from rank 0, 0, 0: slot 0 from rank 1, 0, 0, 1: slot 1 from rank 0]
    bases_P   = [0, 5] on rank 0, [2, 6] on rank 1: where the first row that this rank sends to each slot lies

So the receiver needs no second sort. All ranks compute the same from the same table.

Store each token's row into the receive buffers of the ranks of its experts, once for each choice.

Store each expert's result at its token's own rank, in the place of the choice that it answers.

The weighted sum of each token's results, which lie in the order of its choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.permute import BLOCK, count_in_blocks, earlier_twins, load_slots, store_counts
from epbackend.kernels.triton.tiles import INTERPRETED, chip_of

ALIGNMENT = 128
"""Bytes: where each such tensor begins, so that rows move in the widest loads and stores."""


@dataclass(frozen=True)
class Mirror:
    """This rank's own tensor, and where each rank's lies in this rank's address space."""

    mine: Tensor
    addresses_R: Tensor
    """int64, on the device."""


@triton.jit
def reach(addresses_R, rank, mine):
    """Pointer to the first element of each rank's tensor, of the type that `mine` points to; `rank` may be a block."""
    address = tl.load(addresses_R + rank)
    return tl.multiple_of(address.to(tl.pointer_type(mine.dtype.element_ty)), 16)


POLLS_PER_S = 5_000 if INTERPRETED.value else 1_000_000
"""How often a waiting rank looks, roughly: an atomic operation on its own memory takes about a microsecond."""


def meet(
    signals: Mirror, meeting_1: Tensor, finding_2: Tensor, rank: int, note: int, patience_s: float
) -> None:
    """`signals` (int64 [R]) are zeros at first, as is `meeting_1` (int64), this rank's count of meetings.

    When a rank does not come within about `patience_s`, its number + 1 and `note` are written to `finding_2` (int64,
    zeros until then, may be pinned host memory) and the GPU stops with an error: whatever follows would be wrong.
    """
    ranks = len(signals.mine)
    polls = max(1, int(patience_s * POLLS_PER_S))
    _meet[(1,)](
        signals.addresses_R,
        signals.mine,
        meeting_1,
        finding_2,
        rank,
        note,
        polls,
        ranks,
        triton.next_power_of_2(ranks),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["rank", "note", "polls"])
def _meet(addresses_R, signals_R, meeting_1, finding_2, rank, note, polls, ranks, RANKS: tl.constexpr):
    """One program. The signals are atomics because those alone carry an order between GPUs (release and acquire)."""
    peer = tl.arange(0, RANKS)
    there = peer < ranks
    meeting = tl.load(meeting_1) + 1
    tl.store(meeting_1, meeting)
    place = reach(addresses_R, tl.where(there, peer, 0), signals_R) + rank
    tl.atomic_xchg(place, tl.zeros((RANKS,), tl.int64) + meeting, mask=there, sem="release", scope="sys")
    nothing = tl.zeros((RANKS,), tl.int64)
    late = peer + 1
    while (tl.max(late) > 0) & (polls > 0):
        seen = tl.atomic_add(signals_R + peer, nothing, mask=there, sem="acquire", scope="sys")
        late = tl.where(there & (seen < meeting), peer + 1, 0)
        polls -= 1
    if tl.max(late) > 0:
        tl.store(finding_2 + 1, note.to(tl.int64))
        tl.store(finding_2, tl.max(late).to(tl.int64))
        stop()


@triton.jit
def stop():
    """End all work of this process on the GPU with an error, once what was stored before has left the GPU."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


def publish_counts(slot_ids_TK: Tensor, tokens: int, table: Mirror, rank: int) -> Tensor:
    """Write this rank's row of every rank's table (int32 [R, P + 1]): its counts of all slots, and `tokens`.

    Returns before_BP (int32): of each block of `permute.BLOCK` choices, how many earlier choices fell on each slot.
    """
    ranks, columns = table.mine.shape
    totals_P, before_BP = count_in_blocks(slot_ids_TK.contiguous().view(-1), columns - 1)
    _publish[(ranks,)](
        totals_P,
        table.addresses_R,
        table.mine,
        tokens,
        rank,
        columns - 1,
        triton.next_power_of_2(columns),
    )
    return before_BP


@triton.jit(do_not_specialize=["tokens", "rank"])
def _publish(totals_P, addresses_R, table_RC, tokens, rank, P, LANES: tl.constexpr):
    """One receiving rank: the row that this rank has there."""
    lane = tl.arange(0, LANES)
    totals = tl.load(totals_P + lane, mask=lane < P, other=0).to(tl.int32)
    row = reach(addresses_R, tl.program_id(0), table_RC) + rank * (P + 1)
    tl.store(row + lane, tl.where(lane < P, totals, tokens), mask=lane <= P)


@dataclass(frozen=True)
class Layout:
    """What the table of counts says to one rank."""

    bases_P: Tensor
    """int64: the row of this rank's first choice of each slot, on the slot's rank."""
    counts_L: Tensor
    """int64: how many rows of the window each of this rank's slots gets from all ranks together."""
    needs_R2: Tensor
    """int64: the rows that each rank gets in all, and the tokens that it has left."""


def lay_out(table_RC: Tensor, rank: int, slots: int, window: tuple[int, int]) -> Layout:
    """`table_RC` is `counts.publish_counts`'s (C is P + 1), `window` the range of rows that `counts_L` tells of."""
    ranks, columns = table_RC.shape
    layout = Layout(
        bases_P=torch.empty(columns - 1, dtype=torch.int64, device=table_RC.device),
        counts_L=torch.empty(slots, dtype=torch.int64, device=table_RC.device),
        needs_R2=torch.empty(ranks, 2, dtype=torch.int64, device=table_RC.device),
    )
    _lay_out[(ranks,)](
        table_RC,
        layout.bases_P,
        layout.counts_L,
        layout.needs_R2,
        rank,
        *window,
        ranks,
        slots,
        triton.next_power_of_2(ranks),
        triton.next_power_of_2(slots),
    )
    return layout


@triton.jit(do_not_specialize=["rank", "first", "last"])
def _lay_out(
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


def place(slot_ids_TK: Tensor, before_BP: Tensor, bases_P: Tensor) -> Tensor:
    """row_S (int64): the row of each choice on its slot's rank; -1 for choices of no slot."""
    row_S = torch.empty(slot_ids_TK.numel(), dtype=torch.int64, device=slot_ids_TK.device)
    if len(before_BP):
        ids_S = slot_ids_TK.contiguous().view(-1)
        _place[(len(before_BP),)](ids_S, before_BP, bases_P, row_S, len(ids_S), len(bases_P), BLOCK)
    return row_S


@triton.jit(do_not_specialize=["S"])
def _place(ids_S, before_BP, bases_P, row_S, S, P, BLOCK: tl.constexpr):
    """One block of choices."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, P)
    known = slot < P
    base = tl.load(bases_P + slot, mask=known, other=0)
    before = tl.load(before_BP + block.to(tl.int64) * P + slot, mask=known, other=0)
    row = base + before + earlier_twins(slot, BLOCK)
    tl.store(row_S + choice, tl.where(known, row, -1), mask=choice < S)


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


ROWS, COLUMNS = 4, 1024
PROGRAMS_PER_SM = 8


def give_back(rows_SD: Tensor, counts_L: Tensor, choice_of_row_S: Tensor, results: Mirror) -> None:
    """Send the first `counts_L.sum()` rows; `results` is [tokens * K, D] on each rank, `choice_of_row_S` as `send`
    wrote it.

    As many programs as fit on the chip share the rows, since how many there are is known on the device alone.
    """
    (choices, width), columns = results.mine.shape, min(COLUMNS, triton.next_power_of_2(rows_SD.shape[1]))
    _give_back[(chip_of(rows_SD.device).sms * PROGRAMS_PER_SM,)](
        rows_SD,
        counts_L,
        choice_of_row_S,
        results.addresses_R,
        results.mine,
        rows_SD.stride(0),
        len(counts_L),
        choices,
        width,
        triton.next_power_of_2(len(counts_L)),
        ROWS,
        columns,
    )


@triton.jit
def _give_back(
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
        source = tl.load(choice_of_row_S + row, mask=row < rows, other=0)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        values = tl.load(rows_SD + row[:, None] * row_stride + column[None, :], mask=inside)
        start = reach(results_R, source // choices, results_CD) + source % choices * D
        tl.store(start[:, None] + column[None, :], values.to(results_CD.dtype.element_ty), mask=inside)


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
