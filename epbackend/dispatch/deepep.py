"""`ep_level` 2 by DeepEP where it is installed: its normal kernels, and its low-latency ones where tokens are bounded.

Written against the documented interface of `deep_ep.Buffer` (https://github.com/deepseek-ai/DeepEP, docs/legacy.md of
2.x, README of 1.x). Slots are DeepEP's experts: slot r * L + l is expert l of rank r, also where ranks have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, Exchange, Problem
from epbackend.dispatch.deepep_link import Link, link_of
from epbackend.dispatch.passes import LocalRows
from epbackend.errors import ConfigError


class DeepEp(Dispatcher):
    name = "deepep"
    level = 2
    summary = "DeepEP's kernels: low-latency ones where a call's tokens are bounded, normal ones otherwise"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._link = link_of(problem.ranks.group)
        self._tokens = problem.most_tokens
        if self._tokens is not None:
            self._link.reserve(self._tokens, problem.ranks.size * problem.slots)

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("deep_ep") is None:
            return "deep_ep is not installed; build it as https://github.com/deepseek-ai/DeepEP says"
        return super().missing()

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        settings = problem.settings
        if reason := super().unsupported(problem):
            return reason
        if settings.dispatcher == "auto":
            return "it is taken only where it is named"
        if reason := cls.missing():
            return reason
        if not getattr(problem.kernels, "on_cuda", False):
            return "it needs device cuda with its Triton kernels"
        if settings.transport != "full":
            return f"its rows travel in full, and transport is {settings.transport}"
        if settings.static and settings.max_tokens is None:
            return "nothing bounds this phase's tokens (decode is bounded by engine.max_batch_size)"
        return None

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """Raises ConfigError for rows that DeepEP does not take."""
        if hidden_TD.dtype != torch.bfloat16:
            raise ConfigError(
                f"MoE layer {self.problem.layer}: deepep carries torch.bfloat16 and the model's dtype is "
                f"{hidden_TD.dtype}; take another dispatcher"
            )
        tokens = hidden_TD, slot_ids_TK.long(), weights_TK.float()
        if self._tokens is None:
            return _NormalExchange(self.problem, self._link, *tokens)
        if len(hidden_TD) > self._tokens:
            raise ConfigError(
                f"MoE layer {self.problem.layer}: {len(hidden_TD)} tokens in a call that may have {self._tokens}; "
                "raise engine.max_batch_size"
            )
        return _LowLatencyExchange(self.problem, self._link, self._tokens, *tokens)


class _NormalExchange(Exchange):
    """A token goes once to each rank that it needs, and one partial sum comes back; the host waits for the counts."""

    def __init__(
        self, problem: Problem, link: Link, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor
    ) -> None:
        self._problem, self._link = problem, link
        self._buffer = link.open(hidden_TD.shape[1])
        self._tokens = hidden_TD, slot_ids_TK, weights_TK

    def dispatch(self) -> Iterator[Batch]:
        hidden_TD, slot_ids_TK, weights_TK = self._tokens
        ranks, slots = self._problem.ranks, self._problem.slots
        to_rank_R, to_node_R, to_slot_P, wanted_TR, _ = self._buffer.get_dispatch_layout(
            slot_ids_TK, ranks.size * slots
        )
        hidden_ND, local_ids_NK, weights_NK, _, self._handle, _ = self._buffer.dispatch(
            hidden_TD,
            num_tokens_per_rank=to_rank_R,
            num_tokens_per_rdma_rank=to_node_R,
            is_token_in_rank=wanted_TR,
            num_tokens_per_expert=to_slot_P,
            topk_idx=slot_ids_TK,
            topk_weights=weights_TK,
        )
        # The choices of other ranks' slots are -1 there.
        slot_ids_NK = torch.where(local_ids_NK >= 0, local_ids_NK + ranks.rank * slots, -1)
        self._local = LocalRows(self._problem, hidden_ND, slot_ids_NK, weights_NK)
        yield self._local.batch(0)

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._local.add(rows_SD, batch)

    def finish(self) -> Tensor:
        out_TD, _, _ = self._buffer.combine(self._local.sums_ND.to(torch.bfloat16), self._handle)
        self._link.clean()
        return out_TD


class _LowLatencyExchange(Exchange):
    """A token goes to each of its experts into room of fixed size; nothing waits for the host."""

    def __init__(
        self,
        problem: Problem,
        link: Link,
        tokens: int,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> None:
        self._problem, self._most = problem, tokens
        self._buffer = link.open(hidden_TD.shape[1])
        self._hidden_TD, self._slot_ids_TK, self._weights_TK = hidden_TD, slot_ids_TK, weights_TK

    def dispatch(self) -> Iterator[Batch]:
        from epbackend.kernels.triton.padded import pack  # imports Triton

        ranks = self._problem.ranks.size
        padded_LCD, counts_L, self._handle, _, _ = self._buffer.low_latency_dispatch(
            self._hidden_TD, self._slot_ids_TK, self._most, ranks * self._problem.slots, use_fp8=False
        )
        # A token chooses a slot once at most, so that this holds every row.
        rows = ranks * self._most * min(self._slot_ids_TK.shape[1], self._problem.slots)
        rows_SD = self._hidden_TD.new_empty(rows, self._hidden_TD.shape[1])
        pack(padded_LCD, counts_L, rows_SD)
        # About as many choices come from all ranks together as this one has itself.
        yield Batch(rows_SD, counts_L.long(), counts_L, step=0, expected=self._slot_ids_TK.numel())

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        from epbackend.kernels.triton.padded import spread

        padded_LCD = self._buffer.get_next_low_latency_combine_buffer(self._handle)
        spread(rows_SD, batch.counts_L, padded_LCD)
        self._out_TD, _, _ = self._buffer.low_latency_combine(
            padded_LCD, self._slot_ids_TK, self._weights_TK, self._handle, zero_copy=True
        )

    def finish(self) -> Tensor:
        return self._out_TD
