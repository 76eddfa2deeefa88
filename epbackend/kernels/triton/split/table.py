"""What the split must know of a layer's slots, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SplitTable:
    """Made once a layout. Rows of XC end in -1 where an expert has fewer copies than others."""

    ranks: int
    slot_E: Tensor
    """int64: each expert's first slot."""
    rank_E: Tensor
    """int32: the rank of an expert that is on one rank alone, else -1."""
    replicated_E: Tensor
    """int32: which of the X an expert is, or -1."""
    expert_X: Tensor
    """int32."""
    slots_XC: Tensor
    """int64: one slot for each rank, in ascending order."""
    ranks_XC: Tensor
    """int32."""

    @classmethod
    def of(
        cls, slot_to_expert_P: Sequence[int], rank_of_slot_P: Sequence[int], device: torch.device
    ) -> SplitTable:
        """From the logical expert and the rank of every slot. Of two slots of an expert on a rank the first counts."""
        slots_of: dict[int, dict[int, int]] = {}
        for slot, (expert, rank) in enumerate(zip(slot_to_expert_P, rank_of_slot_P, strict=True)):
            slots_of.setdefault(int(expert), {}).setdefault(int(rank), slot)
        experts = range(len(slots_of))
        replicated = [expert for expert in experts if len(slots_of[expert]) > 1]
        most = max((len(slots_of[expert]) for expert in replicated), default=1)

        def padded(values: Sequence[int]) -> list[int]:
            return [*values, *[-1] * (most - len(values))]

        def ints(values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        single = [next(iter(slots_of[expert])) if len(slots_of[expert]) == 1 else -1 for expert in experts]
        index = {expert: x for x, expert in enumerate(replicated)}
        return cls(
            ranks=max(rank_of_slot_P) + 1,
            slot_E=ints([next(iter(slots_of[expert].values())) for expert in experts], torch.int64),
            rank_E=ints(single),
            replicated_E=ints([index.get(expert, -1) for expert in experts]),
            expert_X=ints(replicated),
            slots_XC=ints([padded([*slots_of[e].values()]) for e in replicated], torch.int64).view(-1, most),
            ranks_XC=ints([padded([*slots_of[e]]) for e in replicated]).view(-1, most),
        )
