"""`alltoall` in a static call: no rank can be told how many rows come, so that each peer's share holds every token.

Then all peers get the same rows, and one all-gather of a step's tokens brings them; rows that chose nothing here are
left out on arrival. Partial sums come back by an all-to-all of equal parts and are added in the order of the ranks.
Beside `allgather` that keeps sums in the tokens' own dtype on the way back (half the bytes in bfloat16), and overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Exchange, Problem
from epbackend.dispatch.collectives import Collectives, Pending, one_ahead
from epbackend.dispatch.passes import LocalRows
from epbackend.dispatch.rowbytes import RowFormat
from epbackend.dispatch.steps import Plan


class StaticExchange(Exchange):
    """Every rank sends the same tokens of each step to every rank."""

    def __init__(self, problem: Problem, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._problem, self._collectives = problem, Collectives.of(problem)
        self._form = RowFormat.of(hidden_TD, slot_ids_TK, problem.settings.transport)
        self._bytes_TB = self._form.pack(problem.kernels, hidden_TD, slot_ids_TK, weights_TK)
        self._out_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
        plan = Plan.worst(len(hidden_TD), problem.ranks.size, self._form.top_k, problem.settings)
        self.rounds = plan.rounds
        steps = [plan.rows(0, 0, step) for step in range(plan.steps)]
        self._tokens = [slice(rows.start, rows.stop) for rows in steps if rows]
        self._returning: tuple[slice, Pending] | None = None

    def dispatch(self) -> Iterator[Batch]:
        sent_in_turn = (self._collectives.start_all_gather(self._bytes_TB[part]) for part in self._tokens)
        for step, arriving in enumerate(one_ahead(sent_in_turn)):
            self._local = LocalRows(self._problem, *self._form.unpack(self._problem.kernels, arriving.wait()))
            yield replace(self._local.batch(0), step=step)

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._local.add(rows_SD, batch)
        pending = self._collectives.start_all_to_all(self._local.sums_ND.to(self._form.dtype))
        self._collect()  # those of the step before, while these travel
        self._returning = self._tokens[batch.step], pending

    def finish(self) -> Tensor:
        self._collect()
        return self._out_TD

    def _collect(self) -> None:
        """Add up the partial sums that are on their way back, if any."""
        if self._returning is None:
            return
        (part, pending), self._returning = self._returning, None
        sums_RTD = pending.wait().unflatten(0, (self._problem.ranks.size, part.stop - part.start))
        self._out_TD[part] = sums_RTD.sum(0, dtype=torch.float32)
