"""The kernels in plain torch: the oracle for every other implementation, and correct on any device.

Example of `permute`, two local slots, three tokens with two choices each (9 is a slot of another rank):

    slot_ids_TK = [[1, 9], [0, 1], [9, 0]]
    source_S    = [2, 5, 0, 3]          # slot 0: token 1 choice 0, token 2 choice 1; slot 1: token 0, token 1
    counts_L    = [2, 2]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from epbackend.kernels import ExpertWeights, Permuted


class ReferenceKernels:
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        return torch.bincount(_one_bucket_for_others(slot_ids_TK, slots), minlength=slots + 1)[:slots]

    def permute(self, hidden_TD: Tensor, slot_ids_TK: Tensor, slots: int,
                window: tuple[int, int] | None = None) -> Permuted:
        bucket_S = _one_bucket_for_others(slot_ids_TK, slots)
        counts_L = torch.bincount(bucket_S, minlength=slots + 1)[:slots]
        ends_L = counts_L.cumsum(0)
        first, last = window or (0, int(ends_L[-1]))
        source_S = bucket_S.argsort(stable=True)[first : min(last, int(ends_L[-1]))]
        if window:
            counts_L = ends_L.clamp(first, last) - (ends_L - counts_L).clamp(first, last)
        rows_SD = hidden_TD.index_select(0, source_S // slot_ids_TK.shape[1])
        return Permuted(rows_SD, counts_L, source_S)

    def unpermute(self, rows_SD: Tensor, source_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        mine_S = (source_S >= 0).nonzero().squeeze(1)
        source_S = source_S[mine_S]
        weight_S1 = weights_TK.reshape(-1)[source_S].float().unsqueeze(1)
        out_TD.index_add_(0, source_S // weights_TK.shape[1], rows_SD[mine_S].float() * weight_S1)

    def pack(self, weight_LNK: Tensor) -> Tensor:
        return weight_LNK.clone()

    def grouped_matmul(self, rows_SK: Tensor, packed: Tensor, counts_L: Tensor,
                       bias_LN: Tensor | None = None) -> Tensor:
        rows_SN = rows_SK.new_empty(rows_SK.shape[0], packed.shape[1])
        first = 0
        for slot, count in enumerate(counts_L.tolist()):
            bias_N = None if bias_LN is None else bias_LN[slot]
            rows = slice(first, first + count)
            rows_SN[rows] = functional.linear(rows_SK[rows], packed[slot], bias_N)
            first += count
        return rows_SN

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        gate_SF, up_SF = rows_S2F.chunk(2, dim=-1)
        return functional.silu(gate_SF) * up_SF

    def expert_mlp(self, rows_SD: Tensor, counts_L: Tensor, weights: ExpertWeights) -> Tensor:
        rows_S2F = self.grouped_matmul(rows_SD, weights.gate_up, counts_L, weights.gate_up_bias_L2F)
        rows_SF = (weights.activation or self.swiglu)(rows_S2F)
        return self.grouped_matmul(rows_SF, weights.down, counts_L, weights.down_bias_LD)


def _one_bucket_for_others(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """Flat slot ids, with every id of another rank replaced by `slots`, so that it sorts last."""
    flat_S = slot_ids_TK.reshape(-1)
    return torch.where((flat_S >= 0) & (flat_S < slots), flat_S, slots)
