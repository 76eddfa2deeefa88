"""`ep_level` 1: every rank gets every token, computes its own experts, and the sums are reduce-scattered.

Two collectives carry the rows, whatever the routing, so the cost does not depend on balance. Ranks may hold different
numbers of tokens, or none: they agree on the largest, and pad to it with tokens that choose no slot. In a static call
they hold equally many, and there is nothing to agree on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.dispatch.base import Dispatcher, Exchange
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.local_experts import LocalRows, PassesExchange, row_bound
from epbackend.dispatch.row_format import RowFormat


class AllGather(Dispatcher):
    name = "allgather"
    level = 1
    summary = "gather all tokens, local experts, then reduce-scatter"

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        collectives = Collectives.of(self.spec)
        tokens_R = self._tokens(hidden_TD, collectives)
        longest, gathered = max(tokens_R), sum(tokens_R)
        settings, kernels = self.spec.settings, self.spec.kernels
        row_format = RowFormat.of(hidden_TD, slot_ids_TK, settings.dispatch_dtype)
        bytes_NB = row_format.encode(kernels, hidden_TD, slot_ids_TK, weights_TK, longest)
        if longest:
            bytes_NB = collectives.all_gather(bytes_NB)
        bound = row_bound(gathered, row_format.top_k, settings)
        local = LocalRows(self.spec, *row_format.decode(kernels, bytes_NB), bound)
        return _AllGatherExchange(local, collectives, hidden_TD)

    def _tokens(self, hidden_TD: Tensor, collectives: Collectives) -> list[int]:
        """How many tokens each rank holds."""
        mine, ranks = len(hidden_TD), self.spec.ranks.size
        if self.spec.settings.static:
            return [mine] * ranks
        mine_1 = torch.full((1,), mine, dtype=torch.int64, device=hidden_TD.device)
        return [tokens for (tokens,) in collectives.all_gather_ints(mine_1)]


class _AllGatherExchange(PassesExchange):
    def __init__(self, local: LocalRows, collectives: Collectives, hidden_TD: Tensor) -> None:
        super().__init__(local)
        self._collectives = collectives
        self._tokens, self._dtype = len(hidden_TD), hidden_TD.dtype

    def finish(self) -> Tensor:
        sums_ND = self._local.sums_ND
        sums_TD = self._collectives.reduce_scatter(sums_ND) if len(sums_ND) else sums_ND
        return sums_TD[: self._tokens].to(self._dtype)
