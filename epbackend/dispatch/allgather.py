"""`ep_level` 1: every rank gets every token, computes its own experts, and the sums are reduce-scattered.

Two collectives carry the rows, whatever the routing, so the cost does not depend on balance. Ranks may hold different
numbers of tokens, none included: they agree on the largest, and pad to it with tokens that choose no slot.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, Exchange, Problem
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.passes import LocalRows, row_bound
from epbackend.dispatch.rowbytes import pack, unpack


class AllGather(Dispatcher):
    name = "allgather"
    level = 1
    summary = "gather all tokens, local experts, then reduce-scatter"

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.settings.level != cls.level:
            return f"serves ep_level 1, and ep_level is {problem.settings.level}"
        if problem.ranks.size == 1:
            return "there is one rank, so no row travels"
        return None

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        return _AllGatherExchange(self.problem, hidden_TD, slot_ids_TK, weights_TK)


class _AllGatherExchange(Exchange):
    def __init__(self, problem: Problem, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._collectives = Collectives.of(problem)
        (self._tokens, hidden_size), top_k, self._dtype = hidden_TD.shape, slot_ids_TK.shape[1], hidden_TD.dtype
        tokens_R = self._collectives.all_gather(hidden_TD.new_tensor([self._tokens], dtype=int)).tolist()
        bytes_TB = pack(hidden_TD, slot_ids_TK, weights_TK, tokens=max(tokens_R))
        bytes_NB = self._collectives.all_gather(bytes_TB) if max(tokens_R) else bytes_TB
        bound = row_bound(sum(tokens_R), top_k, problem.settings)
        self._local = LocalRows(problem, *unpack(bytes_NB, hidden_size, top_k, hidden_TD.dtype), bound)

    def dispatch(self) -> Iterator[Batch]:
        yield from self._local.batches()
        self.passes = self._local.passes

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._local.add(rows_SD, batch)

    def finish(self) -> Tensor:
        out_ND = self._local.out_ND
        out_TD = self._collectives.reduce_scatter(out_ND) if len(out_ND) else out_ND
        return out_TD[: self._tokens].to(self._dtype)
