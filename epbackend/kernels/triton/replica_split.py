"""The token splits on the device: from choices to a slot for each, one launch and nothing read back.

Integer for integer what `epbackend.placement.replica_split` computes on the CPU, so that ranks of either kind agree.
With more choices than one program counts by the way (`permute_few.MOST_CHOICES`) two launches count them first;
`level` with several sources counts before it asks them.

From how many tokens a replica takes to which ones: what both splits share.

The n choices of an expert sit down on n seats, its replicas' quotas side by side; the i-th one takes seat i * STRIDE
% n, so that replicas alternate along the batch.

`even` and `nearest`: equal quotas for the replicas that take any, or quotas that differ by one.

What `level` must know of a layer's slots, on the device.

How many of its tokens each replica takes, so that the fullest rank is as empty as can be.

One program: every step follows from the one before. Loads of all ranks and shares of all replicas stay in registers.
`epbackend/placement/replica_split_reference.py` says in words and plain Python what happens here: replicated experts
pour their tokens anew on the ranks of their replicas, in sweeps; before every second sweep loads are carried along a
tree of ranks.

How many of one source's tokens go to each replica, near ones first.

Sources and replicas meet in blocks of one source, then of a node, then of all. In each block the tokens that its
sources still have lie on one line, and the room that its replicas still have on another: a source's quota of a
replica is the overlap of their two intervals.

`level`: one launch from the counts of all sources to a slot for every choice of one's own.

Every program works out the shares and its source's quotas anew, so that none has to wait for another, and then seats
the choices of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.id_check import NOTHING as NO_ID
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.kernels.triton.permute import MOST_CHOICES, count, count_in_blocks, load_slots
from epbackend.kernels.triton.tiles import Chip, chip_of

__all__ = ["EvenSplit", "level_split"]


STRIDE = tl.constexpr(3762083063)
"""The prime of `epbackend.placement.replica_split`."""

NOTHING = tl.constexpr(NO_ID)

BLOCK = 32
"""Choices that one program seats at a time; it compares each with each."""


@dataclass(frozen=True)
class Counted:
    """The choices of a batch, and their counts where a program cannot find them by the way."""

    ids_S: Tensor
    totals_E: Tensor | None
    """int64."""
    before_BE: Tensor | None
    """int32: in the blocks before each block."""
    all: int
    """A power of two that holds all choices; 0 where they are counted already."""

    @classmethod
    def of(cls, ids_S: Tensor, experts: int) -> Counted:
        if len(ids_S) <= MOST_CHOICES:
            return cls(ids_S, None, None, triton.next_power_of_2(max(BLOCK, len(ids_S))))
        totals_E, before_BE = count_in_blocks(ids_S, experts, BLOCK)
        return cls(ids_S, totals_E, before_BE, 0)

    def counts_E(self, experts: int) -> Tensor:
        """int64."""
        return count(self.ids_S, experts) if self.totals_E is None else self.totals_E

    @property
    def blocks(self) -> int:
        return triton.cdiv(len(self.ids_S), BLOCK)


@triton.jit
def count_all(ids_S, S, E, LANES: tl.constexpr, ALL: tl.constexpr):
    """How many choices each lane's expert has; lane E takes the ids that are no expert's."""
    return tl.histogram(load_slots(ids_S, tl.arange(0, ALL), S, E), LANES)


@triton.jit
def find_seats(
    ids_S,
    totals_E,
    before_BE,
    block,
    expert,
    S,
    E,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(seat of each choice of a block among its expert's, how many seats there are); `expert` is E for no expert."""
    nth = tl.arange(0, BLOCK)
    known = expert < E
    if ALL:
        each = tl.arange(0, ALL)
        earlier = tl.where(each < block * BLOCK, load_slots(ids_S, each, S, E), E)
        seats = tl.gather(count_all(ids_S, S, E, LANES, ALL), expert, 0)
        before = tl.gather(tl.histogram(earlier, LANES), expert, 0)
    else:
        seats = tl.load(totals_E + expert, mask=known, other=1).to(tl.int32)
        row = (block * BLOCK + nth).to(tl.int64) // BLOCK
        before = tl.load(before_BE + row * E + expert, mask=known, other=0)
    twins = (expert[:, None] == expert[None, :]) & (nth[None, :] < nth[:, None])
    occurrence = (before + tl.sum(twins.to(tl.int32), 1)).to(tl.int64)
    seats = tl.where(known, seats, 1)
    return (occurrence * STRIDE % seats).to(tl.int32), seats


@triton.jit
def replica_of_seat(quota, seat):
    """Which replica each choice takes; `quota` has a row for each choice."""
    return tl.sum((tl.cumsum(quota, 1) <= seat[:, None]).to(tl.int32), 1)


@triton.jit
def store_slots(slot_ids_S, slot, slot_of_first, ids_S, found_1, choice, S, E):
    """Store the slots. A choice of no expert goes to a slot of the first one, and its id to the guard."""
    ids = tl.load(ids_S + choice, mask=choice < S, other=0).to(tl.int64)
    wild = (ids < 0) | (ids >= E)
    tl.store(slot_ids_S + choice, tl.where(wild, slot_of_first, slot), mask=choice < S)
    if found_1 is not None:
        largest = tl.max(tl.where(wild, ids, NOTHING))
        tl.store(found_1, largest, mask=largest != NOTHING)


def empty_slots(topk_ids_TK: Tensor) -> Tensor:
    return torch.empty(topk_ids_TK.shape, dtype=torch.int64, device=topk_ids_TK.device)


FEW = 512
"""Choices that one warp counts in its registers."""


class EvenSplit:
    """See `epbackend.kernels.Kernels.even_split`."""

    def __init__(self, replicas: EvenReplicas, device: torch.device, guard: ExpertIdCheck | None) -> None:
        self._guard = guard
        self._slot_ids_EC = torch.tensor(replicas.slot_ids_EC, device=device)
        self._place_EC, self._takers_E = (
            torch.tensor(table, dtype=torch.int32, device=device)
            for table in (replicas.place_EC, replicas.takers_E)
        )
        self._turn_2 = torch.zeros(2, dtype=torch.int64, device=device)

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        if self._guard:
            self._guard.report()
        (experts, replicas), slot_ids_TK = self._slot_ids_EC.shape, empty_slots(topk_ids_TK)
        if topk_ids_TK.numel():
            ids_S = topk_ids_TK.contiguous().view(-1)
            counted = Counted.of(ids_S, experts) if replicas > 1 else Counted(ids_S, None, None, 0)
            _even_slots[(counted.blocks,)](
                ids_S=ids_S,
                totals_E=counted.totals_E,
                before_BE=counted.before_BE,
                slot_ids_EC=self._slot_ids_EC,
                place_EC=self._place_EC,
                takers_E=self._takers_E,
                turn_2=self._turn_2,
                found_1=self._guard.found_1 if self._guard else None,
                slot_ids_S=slot_ids_TK,
                S=len(ids_S),
                E=experts,
                C=replicas,
                CS=triton.next_power_of_2(replicas),
                LANES=triton.next_power_of_2(experts + 1),
                ALL=counted.all,
                BLOCK=BLOCK,
                num_warps=1 if counted.all <= FEW else 4,
            )
        return slot_ids_TK


@triton.jit(do_not_specialize=["S"])
def _even_slots(
    ids_S,
    totals_E,
    before_BE,
    slot_ids_EC,
    place_EC,
    takers_E,
    turn_2,
    found_1,
    slot_ids_S,
    S,
    E,
    C: tl.constexpr,
    CS: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of choices. turn_2: calls so far, and programs of this call that have finished."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    expert = load_slots(ids_S, choice, S, E)
    known = expert < E
    replica = tl.zeros_like(expert)
    if C > 1:
        turn = tl.load(turn_2)
        seat, seats = find_seats(ids_S, totals_E, before_BE, block, expert, S, E, LANES, ALL, BLOCK)
        takers = tl.load(takers_E + expert, mask=known, other=1)
        each = tl.arange(0, CS)[None, :]
        place = expert[:, None] * C + each
        place = tl.load(place_EC + place, mask=known[:, None] & (each < C), other=-1)
        taking = place >= 0
        place -= (turn % takers).to(tl.int32)[:, None]
        place = tl.where(place < 0, place + takers[:, None], place)
        more = (place < (seats % takers)[:, None]).to(tl.int32)
        replica = replica_of_seat(tl.where(taking, (seats // takers)[:, None] + more, 0), seat)
        # The last program moves the turn on, when all have read it.
        tl.debug_barrier()
        if tl.atomic_add(turn_2 + 1, 1) == tl.num_programs(0) - 1:
            tl.store(turn_2, turn + 1)
            tl.store(turn_2 + 1, 0)
    slot = tl.load(slot_ids_EC + expert * C + replica, mask=known & (replica < C), other=0)
    store_slots(slot_ids_S, slot, tl.load(slot_ids_EC), ids_S, found_1, choice, S, E)


@dataclass(frozen=True)
class LevelTable:
    """Made once a layer. X counts the experts on several ranks, C their replicas, one a rank; J the others of a
    rank."""

    first_slot_E: Tensor
    """int64: each expert's first slot."""
    replicated_E: Tensor
    """int32: which of the X an expert is, or -1."""
    single_RJ: Tensor
    """int32: the experts that are on this rank alone; rows end in -1."""
    expert_X: Tensor
    """int32."""
    slots_XC: Tensor
    """int64, in ascending order; rows end in -1, here and below."""
    ranks_XC: Tensor
    """int32: the rank of each replica."""
    sources_XC: Tensor
    """int32: the source that the rank belongs to."""

    @classmethod
    def of(cls, replicas: LevelReplicas, device: torch.device) -> LevelTable:
        """Of two slots of an expert on a rank the first counts."""
        layout = replicas.layout
        kept = [
            _one_a_rank(layout.slots_EC[expert], layout.rank_of_slot_P) for expert in range(layout.experts)
        ]
        replicated = [expert for expert, slots in enumerate(kept) if len(slots) > 1]
        single_of: list[list[int]] = [[] for _ in range(layout.ranks)]
        for expert, slots in enumerate(kept):
            if len(slots) == 1:
                single_of[layout.rank_of_slot_P[slots[0]]].append(expert)
        index_E = np.full(layout.experts, -1)
        index_E[replicated] = np.arange(len(replicated))
        slots_XC = _padded([kept[expert] for expert in replicated])
        here_XC = slots_XC >= 0

        def on(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(np.array(values), dtype=dtype, device=device)

        return cls(
            first_slot_E=on(replicas.slot_ids_EC[:, 0], torch.int64),
            replicated_E=on(index_E),
            single_RJ=on(_padded(single_of)),
            expert_X=on(replicated),
            slots_XC=on(
                _padded([replicas.slot_ids_EC[e, np.isin(layout.slots_EC[e], kept[e])] for e in replicated]),
                torch.int64,
            ),
            ranks_XC=on(np.where(here_XC, layout.rank_of_slot_P[slots_XC], -1)),
            sources_XC=on(np.where(here_XC, replicas.by_source.rank_of_slot_P[slots_XC], -1)),
        )


def _one_a_rank(slots_C: np.ndarray, rank_of_slot_P: np.ndarray) -> np.ndarray:
    slots_C = slots_C[slots_C >= 0]
    return slots_C[np.unique(rank_of_slot_P[slots_C], return_index=True)[1]]


def _padded(rows: list) -> np.ndarray:
    """[rows, the longest one] (int64), -1 past the ends."""
    table = np.full((len(rows), max(map(len, rows), default=0)), -1)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


GAP_BITS = tl.constexpr(10)
MOST_SWEEPS = tl.constexpr(64)
"""As in the reference."""


@triton.jit
def level_shares(
    tokens,
    single_RJ,
    expert_X,
    ranks_XC,
    R,
    J,
    X,
    C,
    RS: tl.constexpr,
    JS: tl.constexpr,
    XS: tl.constexpr,
    CS: tl.constexpr,
):
    """shares [XS, CS], zero where a row has no replica. `tokens` has a lane for each expert; RS, JS, XS and CS are
    powers
    of two that hold the ranks, the experts on one rank alone, the replicated ones and their replicas."""
    loads = _single_loads(tokens, single_RJ, R, J, RS, JS)
    nth = tl.arange(0, XS)
    tokens_X = tl.gather(tokens, tl.load(expert_X + nth, mask=nth < X, other=0), 0)
    tokens_X = tl.where(nth < X, tokens_X, 0)
    each_rank = tl.arange(0, RS)
    each, replica = nth[:, None], tl.arange(0, CS)[None, :]
    here = (each < X) & (replica < C)
    here = here & (tl.load(ranks_XC + each * C + replica, mask=here, other=-1) >= 0)
    replicas = tl.maximum(tl.sum(here.to(tl.int32), 1), 1)
    more = (replica < (tokens_X % replicas)[:, None]).to(tl.int32)
    shares = tl.where(here, (tokens_X // replicas)[:, None] + more, 0)
    for x in range(0, X):
        loads += _spread(_row(shares, x, XS), _ranks(ranks_XC, x, C, CS), each_rank)
    sweep = tl.zeros((), tl.int32)
    going = sweep == 0
    while going:
        size, total, order, joined, giver, taker = _grow_tree(loads, shares, ranks_XC, X, C, XS, CS, RS)
        most = tl.max(loads)
        going = most - (most >> GAP_BITS) > (total + size - 1) // size
        if going:
            if sweep % 2 == 1:
                loads, shares = _carry(
                    loads, shares, ranks_XC, C, size, total, order, joined, giver, taker, XS, CS, RS
                )
            loads, shares = _sweep(loads, shares, tokens_X, ranks_XC, X, C, XS, CS, RS)
        sweep += 1
        going = going & (sweep < MOST_SWEEPS)
    return shares


@triton.jit
def _single_loads(tokens, single_RJ, R, J, RS: tl.constexpr, JS: tl.constexpr):
    """Tokens of each rank's own experts; -1 in lanes past the ranks, so that they are never the fullest."""
    flat = tl.arange(0, RS * JS)
    rank, place = flat // JS, flat % JS
    expert = tl.load(single_RJ + rank * J + place, mask=(rank < R) & (place < J), other=-1)
    of_single = tl.where(expert >= 0, tl.gather(tokens, tl.maximum(expert, 0), 0), 0)
    loads = tl.sum(tl.reshape(of_single, (RS, JS)), 1)
    return tl.where(tl.arange(0, RS) < R, loads, -1)


@triton.jit
def _ranks(ranks_XC, x, C, CS: tl.constexpr):
    """The ranks of one expert's replicas, -1 past them."""
    replica = tl.arange(0, CS)
    return tl.load(ranks_XC + x * C + replica, mask=replica < C, other=-1)


@triton.jit
def _row(shares, x, XS: tl.constexpr):
    """shares[x]."""
    return tl.sum(tl.where(tl.arange(0, XS)[:, None] == x, shares, 0), 0)


@triton.jit
def _spread(values, rank, each_rank):
    """For every rank the sum of the values that are on it."""
    return tl.sum(tl.where(rank[:, None] == each_rank[None, :], values[:, None], 0), 0)


@triton.jit
def _sweep(loads, shares, tokens_X, ranks_XC, X, C, XS: tl.constexpr, CS: tl.constexpr, RS: tl.constexpr):
    """Pour every replicated expert anew."""
    each_rank = tl.arange(0, RS)
    for x in range(0, X):
        rank = _ranks(ranks_XC, x, C, CS)
        loads -= _spread(_row(shares, x, XS), rank, each_rank)
        tokens = tl.sum(tl.where(tl.arange(0, XS) == x, tokens_X, 0))
        poured = _pour(tokens, tl.gather(loads, tl.maximum(rank, 0), 0), rank >= 0)
        loads += _spread(poured, rank, each_rank)
        shares = tl.where(tl.arange(0, XS)[:, None] == x, poured[None, :], shares)
    return loads, shares


@triton.jit
def _pour(tokens, load, here):
    """Tokens poured on ranks that carry `load`: those under the water end level, the first ones get what is left."""
    under = here
    before = tl.zeros((), tl.int32)
    count = tl.sum(under.to(tl.int32))
    total = tokens + tl.sum(tl.where(under, load, 0))
    while count != before:
        before = count
        under = here & (load <= total // count)
        count = tl.sum(under.to(tl.int32))
        total = tokens + tl.sum(tl.where(under, load, 0))
    level = total // count
    nth = tl.cumsum(under.to(tl.int32)) - 1
    return tl.where(under, level - load + (nth < total - level * count).to(tl.int32), 0)


@triton.jit
def _grow_tree(loads, shares, ranks_XC, X, C, XS: tl.constexpr, CS: tl.constexpr, RS: tl.constexpr):
    """The ranks to which tokens of the fullest rank can get, and their number and load.

    Of each rank: `order` of joining, or -1; the expert that `joined` it, its replica nearer to the root (`giver`),
    and its replica there (`taker`).
    """
    each_rank, replica = tl.arange(0, RS), tl.arange(0, CS)
    total = tl.max(loads)
    root = tl.min(tl.where(loads == total, each_rank, RS))
    order = tl.where(each_rank == root, 0, -1)
    joined, giver, taker = tl.zeros_like(order), tl.zeros_like(order), tl.zeros_like(order)
    grown = tl.zeros((), tl.int32)
    size = grown + 1
    while size > grown:
        grown = size
        for x in range(0, X):
            rank = _ranks(ranks_XC, x, C, CS)
            inside = tl.gather(order, tl.maximum(rank, 0), 0) >= 0
            gives = (rank >= 0) & inside & (_row(shares, x, XS) > 0)
            first_giver = tl.min(tl.where(gives, replica, CS))
            joins = ((rank >= 0) & (inside == 0) & (first_giver < CS)).to(tl.int32)
            place = size + tl.cumsum(joins) - joins
            new = _spread(joins, rank, each_rank) > 0
            order = tl.where(new, _spread(place * joins, rank, each_rank), order)
            joined = tl.where(new, x, joined)
            giver = tl.where(new, first_giver, giver)
            taker = tl.where(new, _spread(replica * joins, rank, each_rank), taker)
            total += tl.sum(tl.where(new, loads, 0))
            size += tl.sum(joins)
    return size, total, order, joined, giver, taker


@triton.jit
def _carry(
    loads,
    shares,
    ranks_XC,
    C,
    size,
    total,
    order,
    joined,
    giver,
    taker,
    XS: tl.constexpr,
    CS: tl.constexpr,
    RS: tl.constexpr,
):
    """Level the tree from its leaves to the root, as far as the shares along its branches go."""
    each, replica, each_rank = tl.arange(0, XS)[:, None], tl.arange(0, CS)[None, :], tl.arange(0, RS)
    mean = total // size
    for step in range(1, size):
        index = size - step
        here = order == index
        x = tl.sum(tl.where(here, joined, 0))
        from_copy, to_copy = tl.sum(tl.where(here, giver, 0)), tl.sum(tl.where(here, taker, 0))
        given = (each == x) & (replica == from_copy)
        taken = (each == x) & (replica == to_copy)
        surplus = tl.sum(tl.where(here, loads, 0)) - mean - (index < total - mean * size).to(tl.int32)
        surplus = tl.minimum(surplus, tl.sum(tl.sum(tl.where(taken, shares, 0), 1)))
        surplus = tl.maximum(surplus, -tl.sum(tl.sum(tl.where(given, shares, 0), 1)))
        shares += tl.where(given, surplus, 0) - tl.where(taken, surplus, 0)
        parent = tl.load(ranks_XC + x * C + from_copy)
        loads += tl.where(each_rank == parent, surplus, 0) - tl.where(here, surplus, 0)
    return loads, shares


@triton.jit
def take(values, index, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a block with SIZE values, by flat indices: Triton 3.7 cannot gather from all shapes of two
    dimensions."""
    flat = tl.gather(tl.reshape(values, (SIZE,)), tl.reshape(index, (ROWS * COLUMNS,)), 0)
    return tl.reshape(flat, (ROWS, COLUMNS))


@triton.jit
def own_quota(
    shares,
    counts_GE,
    stride,
    expert_X,
    sources_XC,
    source,
    node,
    G,
    X,
    C,
    XS: tl.constexpr,
    CS: tl.constexpr,
    GS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """quota [XS, CS] of `source`, from the shares [XS, CS] of all; CHUNK experts at a time."""
    each = tl.arange(0, XS)[:, None]
    replica, sources = tl.arange(0, CS)[None, :], tl.arange(0, GS)[None, :]
    quota = tl.zeros_like(shares)
    for start in range(0, X, CHUNK):
        x = (start + tl.arange(0, CHUNK))[:, None]
        expert = tl.load(expert_X + x, mask=x < X, other=0)
        counts = counts_GE + sources.to(tl.int64) * stride + expert
        tokens = tl.load(counts, mask=(x < X) & (sources < G), other=0).to(tl.int32)
        holder = tl.load(sources_XC + x * C + replica, mask=(x < X) & (replica < C), other=-1)
        room = take(shares, tl.minimum(x, XS - 1) * CS + replica, XS * CS, CHUNK, CS)
        room = tl.where(x < X, room, 0)
        part = tl.zeros_like(room)
        for step in tl.static_range(3):
            if step == 0:
                block = 1
            elif step == 1:
                block = node
            else:
                block = G
            gained, tokens, room = _meet(tokens, room, holder, source, block, CS, GS, CHUNK)
            part += gained
        mine = (each >= start) & (each < start + CHUNK)
        row = tl.minimum(tl.maximum(each - start, 0), CHUNK - 1)
        quota = tl.where(mine, take(part, row * CS + replica, CHUNK * CS, XS, CS), quota)
    return quota


@triton.jit
def _meet(tokens, room, holder, source, block, CS: tl.constexpr, GS: tl.constexpr, CHUNK: tl.constexpr):
    """(what the source gives each replica of its own block, tokens left, room left), for some experts [.., GS], [..,
    CS].

    `holder` is the source of each replica, -1 past them; `block` how many sources a block has.
    """
    sources, replica = tl.arange(0, GS)[None, :], tl.arange(0, CS)
    block_G = sources // block
    block_C = tl.where(holder >= 0, holder // block, -1)
    start_of_x = tl.arange(0, CHUNK)[:, None] * GS
    first = block_G * block
    last = tl.minimum(first + block, GS) - 1
    sums = tl.cumsum(tokens, 1)
    ends = sums - take(sums - tokens, start_of_x + first, CHUNK * GS, CHUNK, GS)
    same = block_C[:, :, None] == block_C[:, None, :]
    earlier = same & (replica[None, None, :] <= replica[None, :, None])
    room_ends = tl.sum(tl.where(earlier, room[:, None, :], 0), 2)
    here = sources == source
    end = tl.sum(tl.where(here, ends, 0), 1)[:, None]
    start = end - tl.sum(tl.where(here, tokens, 0), 1)[:, None]
    overlap = tl.maximum(tl.minimum(room_ends, end) - tl.maximum(room_ends - room, start), 0)
    inside = block_C[:, :, None] == block_G[:, None, :]
    room_G = tl.sum(tl.where(inside, room[:, :, None], 0), 1)
    met_G = tl.minimum(take(ends, start_of_x + last, CHUNK * GS, CHUNK, GS), room_G)
    at = holder[:, :, None] == sources[:, None, :]
    met_C = tl.sum(tl.where(at, met_G[:, None, :], 0), 2)
    tokens = tl.minimum(tokens, tl.maximum(ends - met_G, 0))
    left = tl.minimum(room, tl.maximum(room_ends - met_C, 0))
    return tl.where(block_C == source // block, overlap, 0), tokens, left


QUOTA_CELLS = 1024
"""Experts times replicas times sources (or replicas) whose quotas are worked out at a time: 8 values a thread."""

SOURCES = tl.constexpr(8)
"""Sources whose counts are added up at a time."""


def level_split(
    replicas: LevelReplicas, device: torch.device, guard: ExpertIdCheck | None, chip: Chip | None
) -> Split:
    """See `epbackend.kernels.Kernels.level_split`; the sum of all counts is below 2^31."""
    table = LevelTable.of(replicas, device)
    if not len(table.expert_X):  # replicas of an expert on one rank only, of which the first takes all
        first_E1 = replicas.slot_ids_EC[:, :1]
        return EvenSplit(EvenReplicas(first_E1, first_E1 >= 0), device, guard)
    return LevelSplit(replicas, table, guard, chip)


class LevelSplit:
    """A layer with experts on several ranks."""

    def __init__(
        self, replicas: LevelReplicas, table: LevelTable, guard: ExpertIdCheck | None, chip: Chip | None
    ) -> None:
        self._replicas, self._table, self._guard, self._chip = replicas, table, guard, chip

    def __call__(self, topk_ids_TK: Tensor) -> Tensor:
        if self._guard:
            self._guard.report()
        experts, slot_ids_TK = len(self._table.first_slot_E), empty_slots(topk_ids_TK)
        counted = Counted.of(topk_ids_TK.contiguous().view(-1), experts)
        counts_GE = self._replicas.gather(counted.counts_E(experts)) if self._replicas.gather else None
        if len(counted.ids_S):
            self._seat(counted, counts_GE, slot_ids_TK)
        return slot_ids_TK

    def _seat(self, counted: Counted, counts_GE: Tensor | None, slot_ids_TK: Tensor) -> None:
        table, replicas = self._table, self._replicas
        (replicated, most), (ranks, single) = table.ranks_XC.shape, table.single_RJ.shape
        xs, cs = triton.next_power_of_2(replicated), triton.next_power_of_2(most)
        sources = 1 if counts_GE is None else len(counts_GE)
        gs = triton.next_power_of_2(sources)
        chip = self._chip or chip_of(counted.ids_S.device)
        _level_slots[(min(counted.blocks, chip.sms),)](
            ids_S=counted.ids_S,
            totals_E=counted.totals_E,
            before_BE=counted.before_BE,
            counts_GE=counts_GE,
            stride=0 if counts_GE is None else counts_GE.stride(0),
            first_slot_E=table.first_slot_E,
            replicated_E=table.replicated_E,
            single_RJ=table.single_RJ,
            expert_X=table.expert_X,
            slots_XC=table.slots_XC,
            ranks_XC=table.ranks_XC,
            sources_XC=table.sources_XC,
            found_1=self._guard.found_1 if self._guard else None,
            slot_ids_S=slot_ids_TK,
            S=len(counted.ids_S),
            blocks=counted.blocks,
            E=len(table.first_slot_E),
            G=sources,
            source=replicas.source,
            node=replicas.node_sources or sources,
            R=ranks,
            J=single,
            X=replicated,
            C=most,
            RS=triton.next_power_of_2(ranks),
            JS=triton.next_power_of_2(max(1, single)),
            XS=xs,
            CS=cs,
            GS=gs,
            CHUNK=max(1, min(xs, QUOTA_CELLS // (cs * max(cs, gs)))),
            LANES=triton.next_power_of_2(len(table.first_slot_E) + 1),
            ALL=counted.all,
            BLOCK=BLOCK,
        )


@triton.jit(do_not_specialize=["S", "blocks", "source", "node", "stride"])
def _level_slots(
    ids_S,
    totals_E,
    before_BE,
    counts_GE,
    stride,
    first_slot_E,
    replicated_E,
    single_RJ,
    expert_X,
    slots_XC,
    ranks_XC,
    sources_XC,
    found_1,
    slot_ids_S,
    S,
    blocks,
    E,
    G,
    source,
    node,
    R,
    J,
    X,
    C,
    RS: tl.constexpr,
    JS: tl.constexpr,
    XS: tl.constexpr,
    CS: tl.constexpr,
    GS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """XS, CS, ... are powers of two that hold X, C, ..."""
    lane = tl.arange(0, LANES)
    if counts_GE is not None:
        tokens = _add_sources(counts_GE, stride, E, G, LANES)
    elif ALL:
        tokens = tl.where(lane < E, count_all(ids_S, S, E, LANES, ALL), 0)
    else:
        tokens = tl.load(totals_E + lane, mask=lane < E, other=0).to(tl.int32)
    quota = level_shares(tokens, single_RJ, expert_X, ranks_XC, R, J, X, C, RS, JS, XS, CS)
    if counts_GE is not None:
        quota = own_quota(
            quota, counts_GE, stride, expert_X, sources_XC, source, node, G, X, C, XS, CS, GS, CHUNK
        )
    slot_of_first = tl.load(first_slot_E)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        choice = block * BLOCK + tl.arange(0, BLOCK)
        expert = load_slots(ids_S, choice, S, E)
        seat, _ = find_seats(ids_S, totals_E, before_BE, block, expert, S, E, LANES, ALL, BLOCK)
        x = tl.load(replicated_E + expert, mask=expert < E, other=-1)
        place = tl.maximum(x, 0)[:, None] * CS + tl.arange(0, CS)[None, :]
        taken = replica_of_seat(take(quota, place, XS * CS, BLOCK, CS), seat)
        slot = tl.load(first_slot_E + expert, mask=(expert < E) & (x < 0), other=0)
        shared = tl.load(slots_XC + x * C + taken, mask=(x >= 0) & (taken < C), other=0)
        store_slots(slot_ids_S, tl.where(x >= 0, shared, slot), slot_of_first, ids_S, found_1, choice, S, E)


@triton.jit
def _add_sources(counts_GE, stride, E, G, LANES: tl.constexpr):
    """Choices of each lane's expert, over all sources."""
    lane = tl.arange(0, LANES)[None, :]
    tokens = tl.zeros((LANES,), tl.int32)
    for start in range(0, G, SOURCES):
        source = (start + tl.arange(0, SOURCES))[:, None]
        counts = counts_GE + source.to(tl.int64) * stride + lane
        tokens += tl.sum(tl.load(counts, mask=(source < G) & (lane < E), other=0).to(tl.int32), 0)
    return tokens
