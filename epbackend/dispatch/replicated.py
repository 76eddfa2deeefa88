"""Every rank already holds all tokens: no row travels, and the ranks' partial sums are added up.

The right one under attention tensor parallelism (dp = 1), and for a single rank, where nothing is left to add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.dispatch.base import Dispatcher, Exchange, LayerSpec
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.local_experts import LocalRows, PassesExchange, row_bound


class Replicated(Dispatcher):
    name = "replicated"
    level = 1
    needs_all_tokens = True
    renormalizes = True
    summary = "every rank holds all tokens: local experts, then all-reduce"

    @classmethod
    def unsupported(cls, spec: LayerSpec) -> str | None:
        return None if spec.ranks.size == 1 else super().unsupported(spec)

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        tokens, top_k = slot_ids_TK.shape
        bound = row_bound(tokens, top_k, self.spec.settings)
        # Sums of several ranks are added in float32.
        dtype = hidden_TD.dtype if self.spec.ranks.size == 1 else torch.float32
        local = LocalRows(
            self.spec,
            hidden_TD,
            slot_ids_TK,
            weights_TK,
            bound,
            dtype=dtype,
            renormalize=self.spec.renormalize,
        )
        return _ReplicatedExchange(local, self.spec, hidden_TD)


class _ReplicatedExchange(PassesExchange):
    def __init__(self, local: LocalRows, spec: LayerSpec, hidden_TD: Tensor) -> None:
        super().__init__(local)
        self._collectives = Collectives.of(spec)
        self._dtype = hidden_TD.dtype

    def finish(self) -> Tensor:
        sums_TD = self._local.sums_ND
        if self._collectives.size > 1 and len(sums_TD):
            self._collectives.all_reduce(sums_TD)
        return sums_TD.to(self._dtype)
