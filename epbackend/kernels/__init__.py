"""Math on one device, no ranks: the contract that every device's kernels keep.

`reference.py` is the contract in plain torch and the oracle of the tests. Shapes: T tokens, D hidden size, K top-k,
F expert width, L local slots, S expanded rows (one for each choice of a token that fell on a slot of this rank).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.kernels.weight_formats import Matrices

Rows = (
    Any  # rows_SD; or int8.Int8Rows, from a dispatcher that sends them quantized, for kernels that take them
)
Packed = Any  # the matrices of L slots in a device's own layout: only the kernels that packed them read them


@dataclass(frozen=True)
class Permuted:
    """Rows sorted by local slot. A device may return more rows than `counts_L.sum()`: garbage, with source -1."""

    rows_SD: Tensor
    counts_L: Tensor
    """int64: rows of each slot."""
    choice_of_row_S: Tensor
    """int64: flat index t * K + k of the choice that a row serves."""


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one rank: packed matrices, optional biases, and the activation between the two products."""

    gate_up: Packed
    """Of gate_up_L2FD."""
    down: Packed
    """Of down_LDF."""
    gate_up_bias_L2F: Tensor | None = None
    down_bias_LD: Tensor | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    """rows_S2F -> rows_SF; None: swiglu."""


class Kernels(Protocol):
    """What a device must offer. Slot ids outside [0, slots) belong to other ranks and are ignored."""

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        """counts_L (int64): how many choices fell on each local slot."""

    def permute(
        self, hidden_TD: Tensor, slot_ids_TK: Tensor, slots: int, window: tuple[int, int] | None = None
    ) -> Permuted:
        """Copy each token once for each choice of a local slot, sorted by slot, ties in the order of (t, k).

        `window` (first, last) keeps only that range of the sorted rows, so that a pass holds a bounded number.
        """

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        """Add weight * row to each row's token in `out_TD` (float32), in a fixed order."""

    def pack(self, weights_LNK: Matrices) -> Packed:
        """Bring [out, in] matrices, one a slot, into the layout that `grouped_matmul` reads fastest.

        What is whole and has that layout already is used where it is. Raises ConfigError, with the forms that would do,
        for one that the device does not take (float8, int8, a dtype).
        """

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Packed, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        """rows_SN: each row times the transposed matrix of its slot, plus its slot's bias."""

    def narrow(self, rows_TD: Tensor, values_TD: Tensor, scale_TG: Tensor) -> None:
        """Fill `values_TD` and `scale_TG` (float32), which may be views of wider rows, with the nearest to `rows_TD`.

        int8 values: G = 1, a row's largest becomes 127. float8_e4m3fn: G = ceil(D / 128), that of each 128 becomes 448.
        """

    def widen(self, values_TD: Tensor, scale_TG: Tensor, out_TD: Tensor) -> None:
        """Fill `out_TD` with values * scale, of what `narrow` made, in the dtype of `out_TD`."""

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        """rows_SF: silu(gate) * up, gate being the first half of a row and up the second."""

    def expert_mlp(
        self, rows_SD: Rows, counts_L: Tensor, weights: ExpertWeights, expected: int | None = None
    ) -> Tensor:
        """rows_SD: down(activation(gate_up(row))) with the matrices of each row's slot.

        Rows that come quantized are not quantized again for W8A8 experts, and dequantized for others. `expected` is
        about how many rows the counts cover, None for all; it may choose how they are computed.
        """

    def even_split(self, replicas: EvenReplicas, device: torch.device, guard: ExpertIdCheck | None) -> Split:
        """What finds a slot for each choice of tokens on `device`, its expert's replicas sharing equally.

        To the last token `placement.split.assign` of `even_shares` or `nearest_quota`, the turn moving on by one with
        each call. An id that no expert has is served as one that exists, and told to the guard.
        """

    def level_split(
        self, replicas: LevelReplicas, device: torch.device, guard: ExpertIdCheck | None
    ) -> Split:
        """The same with shares that level the ranks' loads.

        To the last token `assign` of `own_quota` of `level_shares`, for all ranks must agree.
        """
