"""`ep_level` 2 by DeepEP where it is installed: its normal kernels, and its low-latency ones where tokens are bounded.

Both modes use one buffer of the process group, since a process cannot have two.

Written against the documented interface of `deep_ep.Buffer` (https://github.com/deepseek-ai/DeepEP, docs/legacy.md of
2.x, README of 1.x). Slots are DeepEP's experts: slot r * L + l is expert l of rank r, also where ranks have fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, Exchange, LayerSpec
from epbackend.dispatch.local_experts import LocalRows
from epbackend.dispatch.settings import UNBOUNDED
from epbackend.errors import ConfigError


class BufferLink:
    """What all layers of a process group need of DeepEP, and its buffer once the first of them runs."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._reserved: tuple[int, int] | None = None
        self._buffer: Any = None
        self._hidden = 0

    def reserve(self, tokens: int, slots: int) -> None:
        """Size the buffer for the low-latency mode with `tokens` tokens of a rank and `slots` slots in all.

        Raises:
            ConfigError: it is there already, and too small.
        """
        before = self._reserved or (0, 0)
        wanted = max(tokens, before[0]), max(slots, before[1])
        if self._buffer is not None and wanted != self._reserved:
            raise ConfigError(
                f"deepep has its buffer, and a layer made after the first call needs a larger one ({tokens} tokens, "
                f"{slots} slots): make all layers of the process group first"
            )
        self._reserved = wanted

    def open(self, hidden: int) -> Any:
        """The `deep_ep.Buffer`, made when all ranks first ask for it together.

        Raises:
            ConfigError: it is there already, for rows of another hidden size.
        """
        if self._buffer is None:
            self._buffer, self._hidden = self._make(hidden), hidden
        if hidden != self._hidden:
            raise ConfigError(
                f"deepep has a buffer for rows of {self._hidden} values, and cannot have a second one for {hidden}; "
                "take another dispatcher"
            )
        return self._buffer

    def clean(self) -> None:
        """Make the buffer fit for the low-latency mode again: the normal one leaves its rows there.

        After the normal call and not before the next low-latency one, which may be replayed from a CUDA graph.
        """
        if self._reserved is not None:
            tokens, slots = self._reserved
            self._buffer.clean_low_latency_buffer(tokens, self._hidden, slots)

    def close(self) -> None:
        self._buffer = None

    def _make(self, hidden: int) -> Any:
        from deep_ep import Buffer

        assert self._group is not None
        ranks = dist.get_world_size(self._group)
        row_bytes = hidden * torch.bfloat16.itemsize
        configs = Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)
        nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
        network = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
        if self._reserved is None:
            return Buffer(self._group, nvlink, network)
        tokens, slots = self._reserved
        network = max(network, Buffer.get_low_latency_rdma_size_hint(tokens, hidden, ranks, slots))
        return Buffer(
            self._group, nvlink, network, low_latency_mode=True, num_qps_per_rank=max(1, slots // ranks)
        )


class DeepEp(Dispatcher):
    name = "deepep"
    level = 2
    summary = "DeepEP's kernels: low-latency ones where a call's tokens are bounded, normal ones otherwise"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self._link = spec.context.get(BufferLink, spec.ranks.group)
        self._tokens = spec.most_tokens
        if self._tokens is not None:
            self._link.reserve(self._tokens, spec.ranks.size * spec.slots)

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("deep_ep") is None:
            return "deep_ep is not installed; build it as https://github.com/deepseek-ai/DeepEP says"
        return super().missing()

    @classmethod
    def unsupported(cls, spec: LayerSpec) -> str | None:
        settings = spec.settings
        if reason := super().unsupported(spec):
            return reason
        if not settings.dispatcher:
            return "it is taken only where it is named"
        if reason := cls.missing():
            return reason
        if spec.device.name != "cuda":
            return f"it needs device cuda, and the device is {spec.device.name}"
        if settings.dispatch_dtype != "full":
            return f"its rows travel in full, and dispatch_dtype is {settings.dispatch_dtype}"
        if settings.static and settings.max_tokens is None:
            return UNBOUNDED
        return None

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """See `Dispatcher.begin`.

        Raises:
            ConfigError: DeepEP does not take these rows, or so many tokens.
        """
        if hidden_TD.dtype != torch.bfloat16:
            raise ConfigError(
                f"MoE layer {self.spec.layer}: deepep carries torch.bfloat16 and the model's dtype is "
                f"{hidden_TD.dtype}; take another dispatcher"
            )
        tokens = hidden_TD, slot_ids_TK.long(), weights_TK.float()
        if self._tokens is None:
            return _NormalExchange(self.spec, self._link, *tokens)
        self.check_tokens(len(hidden_TD), self._tokens)
        return _LowLatencyExchange(self.spec, self._link, self._tokens, *tokens)


class _NormalExchange(Exchange):
    """A token goes once to each rank that it needs, and one partial sum comes back; the host waits for the counts."""

    def __init__(
        self, spec: LayerSpec, link: BufferLink, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor
    ) -> None:
        self._spec, self._link = spec, link
        self._buffer = link.open(hidden_TD.shape[1])
        self._tokens = hidden_TD, slot_ids_TK, weights_TK

    def dispatch(self) -> Iterator[Batch]:
        hidden_TD, slot_ids_TK, weights_TK = self._tokens
        ranks, slots = self._spec.ranks, self._spec.slots
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
        self._local = LocalRows(self._spec, hidden_ND, slot_ids_NK, weights_NK, dtype=torch.bfloat16)
        yield self._local.batch(0)

    def combine(self, rows_SD: Tensor) -> None:
        self._local.add(rows_SD)

    def finish(self) -> Tensor:
        out_TD, _, _ = self._buffer.combine(self._local.sums_ND, self._handle)
        self._link.clean()
        return out_TD


class _LowLatencyExchange(Exchange):
    """A token goes to each of its experts, into blocks of fixed size; nothing waits for the host."""

    def __init__(
        self,
        spec: LayerSpec,
        link: BufferLink,
        tokens: int,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> None:
        self._spec, self._most_tokens = spec, tokens
        self._buffer = link.open(hidden_TD.shape[1])
        self._hidden_TD, self._slot_ids_TK, self._weights_TK = hidden_TD, slot_ids_TK, weights_TK

    def dispatch(self) -> Iterator[Batch]:
        from epbackend.kernels.triton.padded import compact  # imports Triton

        ranks = self._spec.ranks.size
        padded_LCD, self._counts_L, self._handle, _, _ = self._buffer.low_latency_dispatch(
            self._hidden_TD, self._slot_ids_TK, self._most_tokens, ranks * self._spec.slots, use_fp8=False
        )
        # A token chooses a slot at most once, so that this holds every row.
        rows = ranks * self._most_tokens * min(self._slot_ids_TK.shape[1], self._spec.slots)
        rows_SD = self._hidden_TD.new_empty(rows, self._hidden_TD.shape[1])
        compact(padded_LCD, self._counts_L, rows_SD)
        # About as many choices come from all ranks together as this one has itself.
        yield Batch(rows_SD, self._counts_L.long(), expected=self._slot_ids_TK.numel())

    def combine(self, rows_SD: Tensor) -> None:
        from epbackend.kernels.triton.padded import spread

        padded_LCD = self._buffer.get_next_low_latency_combine_buffer(self._handle)
        spread(rows_SD, self._counts_L, padded_LCD)
        self._out_TD, _, _ = self._buffer.low_latency_combine(
            padded_LCD, self._slot_ids_TK, self._weights_TK, self._handle, zero_copy=True
        )

    def finish(self) -> Tensor:
        return self._out_TD
