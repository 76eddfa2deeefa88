"""Sort choices by local slot and copy each token once for each (`permute`); add the results up again (`unpermute`).

`permute` is a stable counting sort, deterministic because nothing depends on which program comes first:

    slot_ids_TK     = [[1, 9], [0, 1], [9, 0]], two slots, blocks of 4 choices; 9 is a slot of another rank
    counts_BL       = [[1, 2], [1, 0]]         # choices of each block, by slot
    before_BL       = [[0, 0], [1, 2]]         # those in earlier blocks
    choice_of_row_S = [2, 5, 0, 3, -1, -1]     # row = rows of earlier slots + before_BL + earlier ones in the block

Nothing is read back to the host, so there are as many rows as there may be choices; those past the counts have choice
-1. A batch of up to MOST_CHOICES takes one launch, in which every program counts all choices for itself instead of
waiting for others; a larger one takes four. Where the first product reads its rows by their tokens, they are sorted and
not copied (`TokenRows`).

`unpermute` is a weighted sum for each token, in float32 and always in the order of the token's choices. Each token
looks its own rows up, so no two programs add to the same place and no atomics are needed:

    choice_of_row_S = [2, 5, 0, -1]            # K = 2; the last row is garbage
    row_of_TK       = [[2, -1], [0, -1], [-1, 1]]     # which row serves each choice
    out_TD[0] += weights_TK[0, 0] * rows_SD[2], out_TD[1] += weights_TK[1, 0] * rows_SD[0], ...

Shapes: T tokens, K choices of a token, D hidden size, L slots, S choices or rows, B blocks of choices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels import Permuted
from epbackend.kernels.triton.launch import cdiv, named_launch, next_power_of_2

# The parts of the sort, which `symmetric.py`, `even_split.py` and `level_split.py` use too.


@triton.jit
def load_slots(ids_S, choice, S, slots):
    """Local slot of each choice; `slots` for those of other ranks, and past the end."""
    slot = tl.load(ids_S + choice, mask=choice < S, other=-1)
    return tl.where((slot >= 0) & (slot < slots), slot, slots).to(tl.int32)


@triton.jit
def rows_of_choices(slot, totals, before, BLOCK: tl.constexpr):
    """Row of each choice of one block, were all rows kept; a row past all rows for choices of other ranks.

    `slot` is of the block's choices, in order. Each lane of the others is a slot: `totals` counts its choices in all
    blocks, `before` those in earlier blocks.
    """
    starts = tl.cumsum(totals) - totals
    return tl.gather(starts + before, slot, 0) + earlier_twins(slot, BLOCK)


@triton.jit
def earlier_twins(slot, BLOCK: tl.constexpr):
    """For each choice of one block, how many earlier ones of the block fell on the same slot."""
    nth = tl.arange(0, BLOCK)
    twins = (slot[:, None] == slot[None, :]) & (nth[None, :] < nth[:, None])
    return tl.sum(twins.to(tl.int32), 1)


@triton.jit
def store_counts(counts_L, totals, first, last, slots, LANES: tl.constexpr):
    """How many of each slot's rows lie in [first, last)."""
    lane = tl.arange(0, LANES)
    ends = tl.cumsum(totals)
    starts = ends - totals
    inside = tl.minimum(tl.maximum(ends, first), last) - tl.minimum(tl.maximum(starts, first), last)
    tl.store(counts_L + lane, inside.to(tl.int64), mask=lane < slots)


@triton.jit
def store_choices(choice_of_row_S, row_of_choice_S, slot, choice, S, row, rows, first, last, slots):
    """Write each choice to its row, if that lies in [first, last), and the row to the choice; return which do.

    `rows` is how many rows there are in all, were all kept. The garbage rows past them are shared out: each choice
    marks the row that has its own number with -1.
    """
    ours = (slot < slots) & (row >= first) & (row < last)
    tl.store(choice_of_row_S + row - first, choice.to(tl.int64), mask=ours)
    tl.store(row_of_choice_S + choice, tl.where(ours, row - first, -1), mask=choice < S)
    tl.store(choice_of_row_S + choice, -1, mask=(first + choice >= rows) & (first + choice < last))
    return ours


@dataclass(frozen=True)
class TokenRows:
    """Rows that are not copied: row s is hidden_TD[choice_of_row_S[s] // top_k], or garbage where the choice is -1."""

    hidden_TD: Tensor
    choice_of_row_S: Tensor
    top_k: int

    def __len__(self) -> int:
        return len(self.choice_of_row_S)

    def copied(self) -> Tensor:
        """rows_SD; one launch, which leaves garbage unwritten."""
        hidden_TD, rows = self.hidden_TD, len(self)
        width = hidden_TD.shape[1]
        rows_SD = hidden_TD.new_empty(rows, width)
        if rows:
            _copy_rows[(cdiv(rows, COPIED_ROWS), cdiv(width, COPIED_COLUMNS))](
                hidden_TD=hidden_TD,
                choice_of_row_S=self.choice_of_row_S,
                rows_SD=rows_SD,
                S=rows,
                token_stride=hidden_TD.stride(0),
                D=width,
                K=self.top_k,
                ROWS=COPIED_ROWS,
                COLUMNS=COPIED_COLUMNS,
            )
        return rows_SD


def source_of(rows: Tensor | TokenRows) -> tuple[Tensor, Tensor | None, int]:
    """What a kernel reads rows from, and how `places` finds them there: the choice of each row, and K."""
    if isinstance(rows, TokenRows):
        return rows.hidden_TD, rows.choice_of_row_S, rows.top_k
    return rows, None, 1


@triton.jit
def places(choice_of_row_S, row, valid, TOP_K: tl.constexpr):
    """int64: where rows lie among what `source_of` gave; rows that are not valid lie anywhere."""
    if choice_of_row_S is not None:
        place = tl.load(choice_of_row_S + row, mask=valid, other=0) // TOP_K
    else:
        place = row.to(tl.int64)
    return place


COPIED_ROWS, COPIED_COLUMNS = 4, 1024
"""The part of the hidden states that one program copies: 16 bytes a thread and load in half precision."""

BLOCK = 128
"""Choices of one program. It compares each with each, so a small block is cheap and a large one is not."""

MOST_CHOICES = 2048
"""256 tokens of 8 choices: with more, counting everything in every program costs more than further launches."""


def count(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """counts_L (int64): how many choices fell on each of the `slots` local slots."""
    ids_S = slot_ids_TK.contiguous().view(-1)
    if not 0 < len(ids_S) <= MOST_CHOICES:
        return count_in_blocks(ids_S, slots)[0]
    counts_1L = torch.empty(1, slots, dtype=torch.int64, device=ids_S.device)
    _count_blocks[(1,)](
        ids_S=ids_S,
        counts_BL=counts_1L,
        S=len(ids_S),
        slots=slots,
        LANES=next_power_of_2(slots + 1),
        BLOCK=next_power_of_2(max(BLOCK, len(ids_S))),
    )
    return counts_1L[0]


def count_in_blocks(ids_S: Tensor, slots: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """totals_L (int64) and before_BL (int32): choices of each slot in all blocks, and in those before each block."""
    blocks = cdiv(len(ids_S), block)
    before_BL = torch.empty(blocks, slots, dtype=torch.int32, device=ids_S.device)
    totals_L = torch.empty(slots, dtype=torch.int64, device=ids_S.device)
    if blocks:
        _count_blocks[(blocks,)](
            ids_S=ids_S,
            counts_BL=before_BL,
            S=len(ids_S),
            slots=slots,
            LANES=next_power_of_2(slots + 1),
            BLOCK=block,
        )
    _add_up_blocks[(slots,)](
        counts_BL=before_BL, totals_L=totals_L, blocks=blocks, slots=slots, CHUNK=ADDED_BLOCKS
    )
    return totals_L, before_BL


@named_launch
@triton.jit(do_not_specialize=["S"])
def _count_blocks(ids_S, counts_BL, S, slots, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Choices of one block, by slot."""
    block = tl.program_id(0)
    slot = load_slots(ids_S, block * BLOCK + tl.arange(0, BLOCK), S, slots)
    lane = tl.arange(0, LANES)
    counts = tl.histogram(slot, LANES)
    tl.store(counts_BL + block.to(tl.int64) * slots + lane, counts, mask=lane < slots)


ADDED_BLOCKS = 1024
"""Blocks whose counts are added up at a time."""


@named_launch
@triton.jit(do_not_specialize=["blocks"])
def _add_up_blocks(counts_BL, totals_L, blocks, slots, CHUNK: tl.constexpr):
    """Replace one slot's counts by their sums over earlier blocks, and store the sum over all."""
    slot = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        entry = counts_BL + block.to(tl.int64) * slots + slot
        counts = tl.load(entry, mask=block < blocks, other=0)
        tl.store(entry, total + tl.cumsum(counts) - counts, mask=block < blocks)
        total += tl.sum(counts)
    tl.store(totals_L + slot, total.to(tl.int64))


def permute(
    hidden_TD: Tensor,
    slot_ids_TK: Tensor,
    slots: int,
    window: tuple[int, int] | None = None,
    *,
    copy: bool = True,
) -> Permuted:
    """See `kernels.Kernels.permute`. Rows: T * K, or with a `window` (first, last) at most last - first.

    Without `copy` they come as `TokenRows`.
    """
    (tokens, top_k), width = slot_ids_TK.shape, hidden_TD.shape[1]
    ids_S = slot_ids_TK.contiguous().view(-1)
    first, last = window or (0, len(ids_S))
    rows = max(0, min(last, len(ids_S)) - first)
    at_once = copy and len(ids_S) <= MOST_CHOICES
    choice_of_row_S = torch.empty(rows, dtype=torch.int64, device=hidden_TD.device)
    left = TokenRows(hidden_TD, choice_of_row_S, top_k)
    out = Permuted(
        rows_SD=hidden_TD.new_empty(rows, width) if at_once else left,
        counts_L=torch.empty(slots, dtype=torch.int64, device=hidden_TD.device),
        choice_of_row_S=choice_of_row_S,
        row_of_choice_S=torch.empty(len(ids_S), dtype=torch.int32, device=hidden_TD.device),
    )
    if tokens == 0:
        out.counts_L.zero_()
    elif len(ids_S) <= MOST_CHOICES:
        _sort_in_one(hidden_TD, ids_S, top_k, first, out)
    else:
        _sort_in_three(ids_S, first, out)
    return replace(out, rows_SD=left.copied()) if copy and not at_once else out


FEW_BLOCK, FEW_COLUMNS = 16, 512
"""Choices of one program where all are sorted in one launch, and the columns that it copies at a time."""


def _sort_in_one(hidden_TD: Tensor, ids_S: Tensor, top_k: int, first: int, out: Permuted) -> None:
    """Fill `out` with the rows from `first` on; for a decode step, where launches cost more than the work itself."""
    slots, rows, width = len(out.counts_L), len(out.choice_of_row_S), hidden_TD.shape[1]
    _permute_few[(cdiv(len(ids_S), FEW_BLOCK),)](
        hidden_TD=hidden_TD,
        ids_S=ids_S,
        rows_SD=None if isinstance(out.rows_SD, TokenRows) else out.rows_SD,
        counts_L=out.counts_L,
        choice_of_row_S=out.choice_of_row_S,
        row_of_choice_S=out.row_of_choice_S,
        S=len(ids_S),
        slots=slots,
        first=first,
        last=first + rows,
        token_stride=hidden_TD.stride(0),
        D=width,
        K=top_k,
        LANES=next_power_of_2(slots + 1),
        ALL=next_power_of_2(max(FEW_BLOCK, len(ids_S))),
        BLOCK=FEW_BLOCK,
        COLUMNS=min(FEW_COLUMNS, next_power_of_2(width)),
    )


@named_launch
@triton.jit(do_not_specialize=["S", "first", "last"])
def _permute_few(
    hidden_TD,
    ids_S,
    rows_SD,
    counts_L,
    choice_of_row_S,
    row_of_choice_S,
    S,
    slots,
    first,
    last,
    token_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of choices; ALL is a power of two that holds all of them. Copies their tokens if `rows_SD` is given."""
    start = tl.program_id(0) * BLOCK
    each = tl.arange(0, ALL)
    every_slot = load_slots(ids_S, each, S, slots)
    # The lane after the local slots counts the choices of other ranks, and is set to zero.
    here = tl.arange(0, LANES) < slots
    totals = tl.where(here, tl.histogram(every_slot, LANES), 0)
    before = tl.where(here, tl.histogram(tl.where(each < start, every_slot, slots), LANES), 0)
    if start == 0:
        store_counts(counts_L, totals, first, last, slots, LANES)
    choice = start + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, slots)
    row = rows_of_choices(slot, totals, before, BLOCK)
    ours = store_choices(
        choice_of_row_S, row_of_choice_S, slot, choice, S, row, tl.sum(totals), first, last, slots
    )
    if rows_SD is not None:
        token = (choice // K).to(tl.int64)
        for start_column in range(0, D, COLUMNS):
            column = start_column + tl.arange(0, COLUMNS)
            inside = ours[:, None] & (column < D)[None, :]
            values = tl.load(hidden_TD + token[:, None] * token_stride + column[None, :], mask=inside)
            target = rows_SD + (row - first).to(tl.int64)[:, None] * D + column[None, :]
            tl.store(target, values, mask=inside)


def _sort_in_three(ids_S: Tensor, first: int, out: Permuted) -> None:
    """Fill `out` with the choices of the rows from `first` on: count blocks, add the counts up, place the choices."""
    slots, rows = len(out.counts_L), len(out.choice_of_row_S)
    totals_L, before_BL = count_in_blocks(ids_S, slots)
    _place[(len(before_BL),)](
        ids_S=ids_S,
        totals_L=totals_L,
        before_BL=before_BL,
        counts_L=out.counts_L,
        choice_of_row_S=out.choice_of_row_S,
        row_of_choice_S=out.row_of_choice_S,
        S=len(ids_S),
        slots=slots,
        first=first,
        last=first + rows,
        LANES=next_power_of_2(slots + 1),
        BLOCK=BLOCK,
    )


@named_launch
@triton.jit(do_not_specialize=["S", "first", "last"])
def _place(
    ids_S,
    totals_L,
    before_BL,
    counts_L,
    choice_of_row_S,
    row_of_choice_S,
    S,
    slots,
    first,
    last,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the choices of one block to their rows, as far as these lie in [first, last)."""
    block = tl.program_id(0)
    lane = tl.arange(0, LANES)
    totals = tl.load(totals_L + lane, mask=lane < slots, other=0).to(tl.int32)
    before = tl.load(before_BL + block.to(tl.int64) * slots + lane, mask=lane < slots, other=0)
    if block == 0:
        store_counts(counts_L, totals, first, last, slots, LANES)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    slot = load_slots(ids_S, choice, S, slots)
    row = rows_of_choices(slot, totals, before, BLOCK)
    store_choices(choice_of_row_S, row_of_choice_S, slot, choice, S, row, tl.sum(totals), first, last, slots)


@named_launch
@triton.jit(do_not_specialize=["S"])
def _copy_rows(
    hidden_TD,
    choice_of_row_S,
    rows_SD,
    S,
    token_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rows_SD[s] = hidden_TD[choice_of_row_S[s] // K]; unused rows stay as they are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    choice = tl.load(choice_of_row_S + row, mask=row < S, other=-1)
    inside = (choice >= 0)[:, None] & (column < D)[None, :]
    values = tl.load(hidden_TD + (choice // K)[:, None] * token_stride + column[None, :], mask=inside)
    tl.store(rows_SD + row.to(tl.int64)[:, None] * D + column[None, :], values, mask=inside)


SUM_BLOCK = 1024
"""Columns of one program, and rows of one in `_invert`."""

FEWEST_ROWS, MOST_ROWS = 16, 4096
"""With up to MOST_ROWS each token searches all rows for its own, which spares the launches that build a table."""


def unpermute(rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
    """Add weight * row to each row's token in `out_TD` (float32). Rows with choice -1 are not read."""
    if not len(rows_SD) or not len(out_TD):
        return
    if len(rows_SD) <= MOST_ROWS:
        _sum(rows_SD, choice_of_row_S, weights_TK, out_TD, add=True, search=True)
    else:
        row_of_choice_S = _row_of_choice(choice_of_row_S, weights_TK.numel())
        _sum(rows_SD, row_of_choice_S, weights_TK, out_TD, add=True)


def weighted_sums(
    rows_SD: Tensor, permuted: Permuted, weights_TK: Tensor, dtype: torch.dtype, renormalize: bool = False
) -> Tensor:
    """sums_TD in `dtype`: the same without anything to add to, in one launch that writes each value once."""
    shape = len(weights_TK), rows_SD.shape[1]
    if not len(rows_SD) or not len(weights_TK):
        return torch.zeros(shape, dtype=dtype, device=rows_SD.device)
    out_TD = torch.empty(shape, dtype=dtype, device=rows_SD.device)
    assert permuted.row_of_choice_S is not None
    _sum(rows_SD, permuted.row_of_choice_S, weights_TK, out_TD, renormalize=renormalize)
    return out_TD


def _sum(
    rows_SD: Tensor,
    lookup: Tensor,
    weights_TK: Tensor,
    out_TD: Tensor,
    *,
    add: bool = False,
    search: bool = False,
    renormalize: bool = False,
) -> None:
    """`lookup` is the row of each choice; with `search` the choice of each row, in which every token looks."""
    (rows, width), (tokens, top_k) = rows_SD.shape, weights_TK.shape
    columns = min(SUM_BLOCK, next_power_of_2(width))
    _weighted_sum[(tokens, cdiv(width, columns))](
        rows_SD=rows_SD,
        lookup=lookup,
        weights_TK=weights_TK,
        out_TD=out_TD,
        S=rows,
        row_stride=rows_SD.stride(0),
        weight_token_stride=weights_TK.stride(0),
        weight_choice_stride=weights_TK.stride(1),
        out_stride=out_TD.stride(0),
        D=width,
        K=top_k,
        ADD=add,
        RENORMALIZE=renormalize,
        COLUMNS=columns,
        KS=next_power_of_2(top_k),
        ALL=next_power_of_2(max(FEWEST_ROWS, rows)) if search else 0,
    )


def _row_of_choice(choice_of_row_S: Tensor, choices: int) -> Tensor:
    """The inverse of choice_of_row_S (int32), -1 for choices that no row serves."""
    row_of = torch.full((choices,), -1, dtype=torch.int32, device=choice_of_row_S.device)
    rows = len(choice_of_row_S)
    _invert[(cdiv(rows, SUM_BLOCK),)](choice_of_row_S=choice_of_row_S, row_of=row_of, S=rows, BLOCK=SUM_BLOCK)
    return row_of


@named_launch
@triton.jit(do_not_specialize=["S"])
def _invert(choice_of_row_S, row_of, S, BLOCK: tl.constexpr):
    """A choice is served by one row at most, so no two programs write to the same place."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(choice_of_row_S + row, mask=row < S, other=-1)
    tl.store(row_of + choice, row, mask=choice >= 0)


@named_launch
@triton.jit(do_not_specialize=["S"])
def _weighted_sum(
    rows_SD,
    lookup,
    weights_TK,
    out_TD,
    S,
    row_stride,
    weight_token_stride,
    weight_choice_stride,
    out_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    ADD: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KS: tl.constexpr,
    ALL: tl.constexpr,
):
    """One token's columns: its rows one after the other, in the order of k; with ADD on top of what is there.

    With RENORMALIZE its weights are divided by their sum; KS is a power of two that holds K. `lookup` is the row of
    each choice, or, where ALL is a power of two that holds all rows, the choice of each row.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = out_TD + token * out_stride + column
    total = tl.zeros((COLUMNS,), tl.float32)
    if ADD:
        total = tl.load(target, mask=column < D)
    weights_K = weights_TK + token * weight_token_stride
    divisor = 1.0
    if RENORMALIZE:
        every = tl.arange(0, KS)
        every_weight = tl.load(weights_K + every * weight_choice_stride, mask=every < K, other=0)
        divisor = tl.sum(every_weight.to(tl.float32))
    if ALL:
        each = tl.arange(0, ALL)
        choice = tl.load(lookup + each, mask=each < S, other=-1)
    for k in tl.static_range(K):
        if ALL:
            row = tl.max(tl.where(choice == token * K + k, each, -1)).to(tl.int64)
        else:
            row = tl.load(lookup + token * K + k).to(tl.int64)
        weight = tl.load(weights_K + k * weight_choice_stride).to(tl.float32)
        if RENORMALIZE:
            weight /= divisor
        values = tl.load(rows_SD + row * row_stride + column, mask=(row >= 0) & (column < D), other=0)
        total += weight * values.to(tl.float32)
    tl.store(target, total.to(out_TD.dtype.element_ty), mask=column < D)
