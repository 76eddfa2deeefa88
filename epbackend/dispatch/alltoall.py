"""`ep_level` 2: each token travels once to each rank that holds an expert of its, and the partial sums come back.

Before the first row travels, one small all-gather of counts tells every rank all splits, so that all agree on the
number of steps. A step moves an equal part of every rank's rows to every peer: as many steps as the receive buffers ask
for (rounds), or as the overlap asks for (chunks) if that is more. The counts also tell how many rows a rank's experts
will compute: devices whose shapes do not follow the routing hold no more than these. While one step is multiplied the
next one travels, and results of the one before travel back.

In a static call no rank can be told how many rows come, so each peer's share holds every token. Then all peers get the
same rows, and one all-gather of a step's tokens brings them; rows that chose nothing here are left out on arrival.
Partial sums come back by an all-to-all of equal parts and are added in the order of the ranks. Compared with
`allgather` that keeps sums in the tokens' own dtype on the way back (half the bytes in bfloat16), and overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, DispatchSettings, Exchange, LayerSpec
from epbackend.dispatch.collectives import Collectives, Pending, one_ahead
from epbackend.dispatch.local_experts import LocalRows
from epbackend.dispatch.row_format import RowFormat


def peer_share(tokens: int, top_k: int, ranks: int, settings: DispatchSettings) -> int | None:
    """Rows that a rank with `tokens` tokens may send to one peer in one round; None: no limit.

    MindIE's buffer of int(tokens * top_k * scale) rows, split equally among the peers.

    >>> peer_share(100, 8, 4, DispatchSettings(level=2, buffer_scale_factors=((64, 0.5), (0, 2.0))))
    100
    """
    if not settings.buffer_scale_factors:
        return None
    return max(1, -(-int(tokens * top_k * settings.buffer_scale(tokens, ranks)) // ranks))


@dataclass(frozen=True)
class ExchangePlan:
    """Which rows travel in which step: known to all ranks before the first row travels."""

    counts_RR: list[list[int]]
    """Rows from each rank (first index) to each rank."""
    rounds: int
    steps: int

    @classmethod
    def of(
        cls, counts_RR: list[list[int]], tokens_R: list[int], top_k: int, settings: DispatchSettings
    ) -> ExchangePlan:
        rounds = 1
        for tokens, counts_R in zip(tokens_R, counts_RR, strict=True):
            share = peer_share(tokens, top_k, len(tokens_R), settings)
            rounds = max(rounds, -(-max(counts_R) // share) if share else 1)
        chunks = settings.overlap_chunks if max(tokens_R) >= settings.overlap_min_tokens else 1
        steps = max(rounds, chunks) if any(map(any, counts_RR)) else 0
        return cls(counts_RR, rounds, steps)

    @classmethod
    def worst(cls, tokens: int, ranks: int, top_k: int, settings: DispatchSettings) -> ExchangePlan:
        """Every rank sends each of its `tokens` tokens to every rank."""
        return cls.of([[tokens] * ranks] * ranks, [tokens] * ranks, top_k, settings)

    def rows(self, sender: int, receiver: int, step: int) -> range:
        """Which of the rows from `sender` to `receiver` travel in `step`: as many in each, give or take one."""
        count = self.counts_RR[sender][receiver]
        return range(count * step // self.steps, count * (step + 1) // self.steps)

    def sent(self, sender: int, step: int) -> slice:
        """Where the rows of `step` are among all that `sender` sends, sorted by step."""
        first, last = (
            sum(count * end // self.steps for count in self.counts_RR[sender]) for end in (step, step + 1)
        )
        return slice(first, last)


class AllToAll(Dispatcher):
    name = "alltoall"
    level = 2
    summary = "send each token once to each rank that needs it, in overlapped steps"

    @classmethod
    def reason(cls, spec: LayerSpec) -> str:
        if not spec.settings.static:
            return cls.summary
        return (
            "every token to every rank, as no size may pass through the host where CUDA graphs are captured; "
            "ep_level 1 for decode sends as much"
        )

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        exchange = _StaticExchange if self.spec.settings.static else _ExactExchange
        return exchange(self.spec, hidden_TD, slot_ids_TK, weights_TK)


class _ExactExchange(Exchange):
    """M rows to send, sorted by step, then by peer, then by token, so that a step is a slice of them."""

    def __init__(self, spec: LayerSpec, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._spec, self._collectives = spec, Collectives.of(spec)
        self._row_format = RowFormat.of(hidden_TD, slot_ids_TK, spec.settings.dispatch_dtype)
        self._bytes_TB = self._row_format.encode(spec.kernels, hidden_TD, slot_ids_TK, weights_TK)
        self._sums_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        wanted_RT = _wanted(slot_ids_TK, spec.slots, spec.ranks.size)
        counts_R, me, size = wanted_RT.sum(1), spec.ranks.rank, spec.ranks.size
        choices_R = spec.kernels.count(slot_ids_TK // spec.slots, size)
        mine = torch.cat([counts_R.new_full((1,), len(hidden_TD)), counts_R, choices_R])
        table = self._collectives.all_gather_ints(mine)
        tokens_R, counts_RR = [row[0] for row in table], [row[1 : 1 + size] for row in table]
        # Rows that this rank's experts compute, in all steps.
        self._rows = sum(row[1 + size + me] for row in table)
        self._plan = ExchangePlan.of(counts_RR, tokens_R, self._row_format.top_k, spec.settings)
        self.rounds = self._plan.rounds
        order_M = _by_step(wanted_RT, counts_R, self._plan.steps)[: sum(counts_RR[me])]
        tokens = max(1, len(hidden_TD))
        self._token_M = order_M % tokens
        # token * R + peer: a peer's partial sum is to its token what an expert's row is to a choice.
        self._choice_M = self._token_M * size + order_M // tokens
        self._returning: tuple[slice, Pending] | None = None

    def dispatch(self) -> Iterator[Batch]:
        sent_in_turn = (self._send(step) for step in range(self._plan.steps))
        for step, arriving in enumerate(one_ahead(sent_in_turn)):
            rows = self._row_format.decode(self._spec.kernels, arriving.wait())
            self._local = LocalRows(
                self._spec, *rows, bound=self._rows, chosen=True, dtype=self._row_format.dtype
            )
            self._step = step
            yield self._local.batch(0)

    def combine(self, rows_SD: Tensor) -> None:
        self._local.add(rows_SD)
        send_R, receive_R = self._splits(self._step)
        pending = self._start(self._local.sums_ND, receive_R, send_R)
        self._collect()  # those of the step before, while these travel
        self._returning = self._sent(self._step), pending

    def finish(self) -> Tensor:
        self._collect()
        return self._sums_TD.to(self._row_format.dtype)

    def _send(self, step: int) -> Pending:
        rows_MB = self._bytes_TB.index_select(0, self._token_M[self._sent(step)])
        return self._start(rows_MB, *self._splits(step))

    def _start(self, rows: Tensor, send_R: list[int], receive_R: list[int]) -> Pending:
        overlap = self._plan.steps > 1  # a single step has nothing beside it
        return self._collectives.start_all_to_all(rows, send_R, receive_R, overlap=overlap)

    def _collect(self) -> None:
        """Add the partial sums that are on their way back, if any, peer by peer for each token."""
        if self._returning is None:
            return
        (sent, pending), self._returning = self._returning, None
        ones_TR = self._sums_TD.new_ones(len(self._sums_TD), self._spec.ranks.size)
        self._spec.kernels.unpermute(pending.wait(), self._choice_M[sent], ones_TR, self._sums_TD)

    def _splits(self, step: int) -> tuple[list[int], list[int]]:
        """Rows to send to each rank, and to receive from each, in `step`."""
        me, peers = self._spec.ranks.rank, range(self._spec.ranks.size)
        send_R = [len(self._plan.rows(me, peer, step)) for peer in peers]
        return send_R, [len(self._plan.rows(peer, me, step)) for peer in peers]

    def _sent(self, step: int) -> slice:
        return self._plan.sent(self._spec.ranks.rank, step)


def _wanted(slot_ids_TK: Tensor, slots: int, ranks: int) -> Tensor:
    """wanted_RT (bool): whether the token chose a slot of the rank."""
    # The last column takes the choices of no slot, -1.
    wanted_TX = slot_ids_TK.new_zeros(len(slot_ids_TK), ranks + 1, dtype=torch.bool)
    return wanted_TX.scatter_(1, slot_ids_TK // slots % (ranks + 1), True)[:, :ranks].t()


def _by_step(wanted_RT: Tensor, counts_R: Tensor, steps: int) -> Tensor:
    """order: indices into the flat [R, T], the wanted ones first, sorted by the step in which they travel.

    Of a peer's n rows the i-th travels in step ((i + 1) * steps - 1) // n, as `ExchangePlan.rows` has it.
    """
    nth_RT = wanted_RT.cumsum(1)
    step_RT = (nth_RT * steps - 1) // counts_R.clamp(min=1)[:, None]
    return torch.where(wanted_RT, step_RT, steps).flatten().argsort(stable=True)


class _StaticExchange(Exchange):
    """Every rank sends the same tokens of each step to every rank."""

    def __init__(self, spec: LayerSpec, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._spec, self._collectives = spec, Collectives.of(spec)
        self._row_format = RowFormat.of(hidden_TD, slot_ids_TK, spec.settings.dispatch_dtype)
        self._bytes_TB = self._row_format.encode(spec.kernels, hidden_TD, slot_ids_TK, weights_TK)
        self._out_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
        plan = ExchangePlan.worst(len(hidden_TD), spec.ranks.size, self._row_format.top_k, spec.settings)
        self.rounds = plan.rounds
        steps = [plan.rows(0, 0, step) for step in range(plan.steps)]
        self._tokens = [slice(rows.start, rows.stop) for rows in steps if rows]
        self._overlap = len(self._tokens) > 1  # a single step has nothing beside it
        self._returning: tuple[slice, Pending] | None = None

    def dispatch(self) -> Iterator[Batch]:
        sent_in_turn = (
            self._collectives.start_all_gather(self._bytes_TB[part], overlap=self._overlap)
            for part in self._tokens
        )
        for step, arriving in enumerate(one_ahead(sent_in_turn)):
            rows = self._row_format.decode(self._spec.kernels, arriving.wait())
            self._local = LocalRows(self._spec, *rows, dtype=self._row_format.dtype)
            self._step = step
            yield self._local.batch(0)

    def combine(self, rows_SD: Tensor) -> None:
        self._local.add(rows_SD)
        pending = self._collectives.start_all_to_all(self._local.sums_ND, overlap=self._overlap)
        self._collect()  # those of the step before, while these travel
        self._returning = self._tokens[self._step], pending

    def finish(self) -> Tensor:
        self._collect()
        return self._out_TD

    def _collect(self) -> None:
        """Add up the partial sums that are on their way back, if any."""
        if self._returning is None:
            return
        (part, pending), self._returning = self._returning, None
        sums_RTD = pending.wait().unflatten(0, (self._spec.ranks.size, part.stop - part.start))
        self._out_TD[part] = sums_RTD.sum(0, dtype=torch.float32)
