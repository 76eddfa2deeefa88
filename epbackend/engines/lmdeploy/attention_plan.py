"""What all layers of one step share: where new keys go, which pages each sequence reads, how decoding is batched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lmdeploy.pytorch.backends.attention import AttentionMetadata
from torch import Tensor

PADDED_TOKENS = 32768
"""Cache tokens that one batched decoding call may read, padding included: bounds its copy of keys and values."""


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of similar length with one new token each, attended in one call."""

    rows_B: Tensor
    """Row of each sequence's query."""
    pages_BP: Tensor
    """Pages of each sequence, as many as the longest one has; the padding repeats valid pages and is masked."""
    length_B: Tensor

    def mask_BS(self, width: int, window: int | None) -> Tensor:
        """True where the query may see the key at that position of its padded cache."""
        position = torch.arange(width)
        visible_BS = position < self.length_B[:, None]
        return visible_BS if window is None else visible_BS & (position >= self.length_B[:, None] - window)


@dataclass(frozen=True)
class Sequence:
    """A sequence with several new tokens, attended alone."""

    rows: slice
    pages_P: Tensor
    length: int
    """Tokens in the cache, the new ones included."""


@dataclass
class AttentionPlan(AttentionMetadata):
    """LMDeploy's attention metadata with the step's plan."""

    page_T: Tensor = None  # type: ignore[assignment]  # LMDeploy's dataclass has defaults, so ours must
    slot_T: Tensor = None  # type: ignore[assignment]
    decoding: list[DecodeGroup] = field(default_factory=list)
    prefilling: list[Sequence] = field(default_factory=list)


def plan_attention(context: Any) -> AttentionPlan:
    """The plan of a step from LMDeploy's StepContext."""
    block = context.kv_caches[0][0].shape[1]
    pages = context.block_offsets.long()
    new_B, length_B = context.q_seqlens.long(), context.kv_seqlens.long()
    sequence_T = torch.repeat_interleave(torch.arange(len(new_B)), new_B)
    start_B = torch.cumsum(new_B, 0) - new_B
    position_T = torch.arange(len(sequence_T)) - start_B[sequence_T] + (length_B - new_B)[sequence_T]

    alone = (new_B > 1).nonzero().flatten().tolist()
    lengths, news, starts = length_B.tolist(), new_B.tolist(), start_B.tolist()
    return AttentionPlan(
        is_decoding=context.is_decoding,
        block_offsets=context.block_offsets,
        q_start_loc=context.q_start_loc,
        q_seqlens=context.q_seqlens,
        kv_seqlens=context.kv_seqlens,
        cu_seqlens_q=torch.nn.functional.pad(torch.cumsum(context.q_seqlens, 0), (1, 0)),
        quant_policy=context.kv_quant_policy,
        page_T=pages[sequence_T, position_T // block],
        slot_T=position_T % block,
        decoding=[
            DecodeGroup(start_B[group], pages[group, : _blocks(lengths[group[0]], block)], length_B[group])
            for group in group_by_length({i: lengths[i] for i in range(len(news)) if news[i] == 1})
        ],
        prefilling=[
            Sequence(
                slice(starts[i], starts[i] + news[i]), pages[i, : _blocks(lengths[i], block)], lengths[i]
            )
            for i in alone
        ],
    )


def group_by_length(lengths: dict[int, int]) -> list[list[int]]:
    """Sequences (index -> length) in groups for one padded call each, the longest first in its group.

    A group ends where padding would cost more than the call saves, that is below half of its longest length, or where
    it would exceed PADDED_TOKENS.

    >>> group_by_length({0: 10, 1: 900, 2: 800})
    [[1, 2], [0]]
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        fits = (
            groups and longest <= 2 * lengths[index] + 64 and longest * (len(groups[-1]) + 1) <= PADDED_TOKENS
        )
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = lengths[index]
    return groups


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)
