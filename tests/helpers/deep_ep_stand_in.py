"""A stand-in for the module `deep_ep`: the part of its documented interface that `dispatch/deepep.py` calls, over gloo.

It shows that the calls fit the documentation (names, shapes, dtypes, order) and that rows come back to their tokens.
It shows nothing of DeepEP itself, which wants Hopper GPUs and a build of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 4 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
    ) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.low_latency_bytes = num_rdma_bytes if low_latency_mode else 0
        self.num_qps_per_rank, self.clean = num_qps_per_rank, True
        assert num_nvl_bytes > 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return 2 * num_max_dispatch_tokens_per_rank * hidden * num_experts

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        self.clean = True

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int):
        assert topk_idx.dtype == torch.int64
        slots = num_experts // self.size
        wanted_TR = torch.stack([(topk_idx // slots == rank).any(1) for rank in range(self.size)], 1)
        to_slot_P = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return wanted_TR.sum(0).int(), None, to_slot_P, wanted_TR, None

    def dispatch(
        self,
        x: Tensor,
        *,
        num_tokens_per_rank: Tensor,
        num_tokens_per_rdma_rank: Tensor | None,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
    ):
        assert (x.dtype, topk_weights.dtype) == (torch.bfloat16, torch.float32)
        self.clean = False
        slots = len(num_tokens_per_expert) // self.size
        sent = self._gather((x, is_token_in_rank, topk_idx, topk_weights))
        mine = [wanted[:, self.rank] for _, wanted, _, _ in sent]
        ids = torch.cat([ids[here] for (_, _, ids, _), here in zip(sent, mine, strict=True)])
        local = ids // slots == self.rank
        return (
            torch.cat([rows[here] for (rows, _, _, _), here in zip(sent, mine, strict=True)]),
            torch.where(local, ids % slots, -1),
            torch.cat([weights[here] for (_, _, _, weights), here in zip(sent, mine, strict=True)]),
            torch.bincount((ids % slots)[local], minlength=slots).tolist(),
            (len(x), mine),
            None,
        )

    def combine(self, x: Tensor, handle: tuple):
        assert x.dtype == torch.bfloat16
        tokens, mine = handle
        answers = self._gather((x, mine))
        sums = torch.zeros(tokens, x.shape[1])
        for rows, sources in answers:
            before = sum(int(here.sum()) for here in sources[: self.rank])
            here = sources[self.rank]
            sums[here] += rows[before : before + int(here.sum())].float()
        return sums.to(torch.bfloat16), None, None

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
    ):
        assert (x.dtype, topk_idx.dtype, use_fp8) == (torch.bfloat16, torch.int64, False)
        assert self.clean, "the buffer is dirty: clean_low_latency_buffer comes first"
        assert self.low_latency_bytes >= self.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, x.shape[1], self.size, num_experts
        )
        slots, room = num_experts // self.size, self.size * num_max_dispatch_tokens_per_rank
        assert self.num_qps_per_rank == slots
        assert len(x) <= num_max_dispatch_tokens_per_rank
        padded = torch.full((slots, room, x.shape[1]), torch.nan, dtype=torch.bfloat16)
        counts, sources = torch.zeros(slots, dtype=torch.int32), []
        for rank, (rows, ids) in enumerate(self._gather((x, topk_idx))):
            for token, choice in (ids // slots == self.rank).nonzero().tolist():
                slot = int(ids[token, choice]) % slots
                padded[slot, counts[slot]] = rows[token]
                sources.append((rank, token, choice, slot, int(counts[slot])))
                counts[slot] += 1
        return padded, counts, (sources, padded.shape), None, None

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> Tensor:
        return torch.full(handle[1], torch.nan, dtype=torch.bfloat16)

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: tuple, zero_copy: bool = False
    ):
        assert (x.dtype, topk_weights.dtype, zero_copy) == (torch.bfloat16, torch.float32, True)
        sums = torch.zeros(len(topk_idx), x.shape[2])
        for rows, sources in self._gather((x, handle[0])):
            for rank, token, choice, slot, nth in sources:
                if rank == self.rank:
                    sums[token] += topk_weights[token, choice] * rows[slot, nth].float()
        return sums.to(torch.bfloat16), None, None

    def _gather(self, mine: tuple) -> list[tuple]:
        parts: list[tuple] = [()] * self.size
        dist.all_gather_object(parts, mine, self.group)
        return parts


def install() -> None:
    """Let `import deep_ep` find the stand-in."""
    module = ModuleType("deep_ep")
    module.Buffer, module.__spec__ = Buffer, sys.modules[__name__].__spec__  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
