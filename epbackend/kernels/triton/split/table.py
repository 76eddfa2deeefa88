"""What `level` must know of a layer's slots, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epbackend.kernels.copies import LevelCopies


@dataclass(frozen=True)
class LevelTable:
    """Made once a layer. X counts the experts on several ranks, C their copies, one a rank; J the others of a rank."""

    first_slot_E: Tensor
    """int64: each expert's first slot."""
    replicated_E: Tensor
    """int32: which of the X an expert is, or -1."""
    single_RJ: Tensor
    """int32: the experts that are on this rank alone; rows end in -1."""
    expert_X: Tensor
    """int32."""
    slots_XC: Tensor
    """int64, in ascending order; rows end in -1, here and below."""
    ranks_XC: Tensor
    """int32: the rank of each copy."""
    sources_XC: Tensor
    """int32: the source that the rank belongs to."""

    @classmethod
    def of(cls, copies: LevelCopies, device: torch.device) -> LevelTable:
        """Of two slots of an expert on a rank the first counts."""
        layout = copies.layout
        kept = [
            _one_a_rank(layout.slots_EC[expert], layout.rank_of_slot_P) for expert in range(layout.experts)
        ]
        replicated = [expert for expert, slots in enumerate(kept) if len(slots) > 1]
        single_of: list[list[int]] = [[] for _ in range(layout.ranks)]
        for expert, slots in enumerate(kept):
            if len(slots) == 1:
                single_of[layout.rank_of_slot_P[slots[0]]].append(expert)
        index_E = np.full(layout.experts, -1)
        index_E[replicated] = np.arange(len(replicated))
        slots_XC = _padded([kept[expert] for expert in replicated])
        here_XC = slots_XC >= 0

        def on(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(np.array(values), dtype=dtype, device=device)

        return cls(
            first_slot_E=on(copies.slot_ids_EC[:, 0], torch.int64),
            replicated_E=on(index_E),
            single_RJ=on(_padded(single_of)),
            expert_X=on(replicated),
            slots_XC=on(
                _padded([copies.slot_ids_EC[e, np.isin(layout.slots_EC[e], kept[e])] for e in replicated]),
                torch.int64,
            ),
            ranks_XC=on(np.where(here_XC, layout.rank_of_slot_P[slots_XC], -1)),
            sources_XC=on(np.where(here_XC, copies.by_source.rank_of_slot_P[slots_XC], -1)),
        )


def _one_a_rank(slots_C: np.ndarray, rank_of_slot_P: np.ndarray) -> np.ndarray:
    slots_C = slots_C[slots_C >= 0]
    return slots_C[np.unique(rank_of_slot_P[slots_C], return_index=True)[1]]


def _padded(rows: list) -> np.ndarray:
    """[rows, the longest one] (int64), -1 past the ends."""
    table = np.full((len(rows), max(map(len, rows), default=0)), -1)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
