"""The math on one device: the contract that every device's kernels keep.

`reference.py` is the contract in plain torch and the oracle of the tests; `cpu/`, `triton/`, `torch_grouped_mm.py`
and `npu/` are faster. A tensor's name ends in its shape:

    T  tokens                      D  hidden size               S  expanded rows: one for each choice of a token
    K  experts chosen per token    F  width of one expert          that fell on a slot of this rank
    E  logical experts             L  slots of this rank        B  blocks of values that share a scale
    C  replicas of an expert       P  slots of all ranks        G  sources
    N, K  outputs and inputs of a matrix [N, K]                 M  rows of one slot, or of one block

A *choice* is one (token, k) pair, a *source* a group of ranks that hold the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.kernels.weight_formats import Matrices

Rows = Any
"""rows_SD; or another form, for kernels that take it: `int8.Int8Rows`, from a dispatcher that sends them quantized, or
`triton.permute.TokenRows`, from a `permute` that leaves them where they are."""

Prepacked = Any
"""The matrices of L slots as `prepack` stores them; only the kernels that made them read them.

reference    one tensor [L, N, K], `Fp8Blocks` or `Int8Weights`
cpu          `cpu.kernels.Packed`, one matrix a slot, plain or in oneDNN's layout; quantized as in the reference
triton       as in the reference
grouped_mm   one tensor [L, N, K]
ascend       one tensor [L, N, K], `Int8Weights`, or `npu.kernels.Tiled` (int8 in CANN's FRACTAL_NZ)

What is not quantized has a `dtype`, which rows must have.
"""


@dataclass(frozen=True)
class Permuted:
    """Rows sorted by local slot. A device may return more rows than `counts_L.sum()`: the rest are garbage."""

    rows_SD: Rows
    counts_L: Tensor
    """int64: rows of each slot."""
    choice_of_row_S: Tensor
    """int64: flat index t * K + k of the choice that a row serves; -1 for garbage."""
    row_of_choice_S: Tensor | None = None
    """int32: the inverse, -1 for a choice that no row serves; from kernels that find it on the way."""


def renormalized(weights_TK: Tensor) -> Tensor:
    """The weights of each token, divided by their sum."""
    return weights_TK / weights_TK.sum(-1, keepdim=True)


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one rank: prepacked matrices, optional biases, and the activation between the two products."""

    gate_up: Prepacked
    """Of gate_up_L2FD."""
    down: Prepacked
    """Of down_LDF."""
    gate_up_bias_L2F: Tensor | None = None
    down_bias_LD: Tensor | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    """rows_S2F -> rows_SF; None: swiglu."""

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the rows which they are multiplied with; None: of any floats, as all matrices are quantized.

        Raises:
            ConfigError: the two matrices want different ones.
        """
        found = [each.dtype for each in (self.gate_up, self.down) if getattr(each, "dtype", None) is not None]
        if len({*found}) > 1:
            raise ConfigError(
                f"gate_up_L2FD is {found[0]} and down_LDF {found[1]}; the matrices of experts are of one dtype"
            )
        return found[0] if found else None


class Kernels(Protocol):
    """What a device must offer. Slot ids outside [0, slots) belong to other ranks and are ignored."""

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        """counts_L (int64): how many choices fell on each local slot."""

    def permute(
        self,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        slots: int,
        window: tuple[int, int] | None = None,
        expected: int | None = None,
    ) -> Permuted:
        """Copy each token once for each choice of a local slot, sorted by slot, ties in the order of (t, k).

        `window` (first, last) keeps only that range of the sorted rows, so that a pass holds a bounded number. With
        `expected`, that of `expert_mlp`, the rows may come in a form that only `expert_mlp` reads.
        """

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        """Add weight * row to each row's token in `out_TD` (float32), in a fixed order."""

    def weighted_sums(
        self,
        rows_SD: Tensor,
        permuted: Permuted,
        weights_TK: Tensor,
        dtype: torch.dtype,
        renormalize: bool = False,
    ) -> Tensor:
        """sums_TD, what `unpermute` adds to zeros, rounded once to `dtype`: for rows that are all there.

        `rows_SD` are the results for the rows of `permuted`. With `renormalize` each token's weights are divided by
        their sum, over all its choices.
        """

    def prepack(self, weights_LNK: Matrices) -> Prepacked:
        """Bring [out, in] matrices, one a slot, into the layout that `grouped_matmul` reads fastest.

        Matrices that come as one tensor in that layout are used in place, without a copy.

        Raises:
            ConfigError: The device does not take the weight format or dtype; the message names those that it takes.
        """

    def prepare(self, weights: ExpertWeights) -> None:
        """Make what follows from a layer's weights alone, before its first call: these kernels serve that layer.

        So the first call launches what later ones do, and a CUDA graph may hold the second.

        Raises:
            ConfigError: The device does not multiply them.
        """

    def slot_memory(self, packed: Prepacked, slot: int) -> list[Tensor]:
        """The bytes of one slot's matrix as they are stored, in a fixed order: uint8 views, to be read and replaced.

        What slots of one layer hold is interchangeable between ranks whose `slot_layout` is the same.
        """

    def slot_layout(self, packed: Prepacked) -> str:
        """How the bytes of a slot are arranged: two ranks of one kind of device may have chosen differently."""

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Prepacked, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        """rows_SN: each row times the transposed matrix of its slot, plus its slot's bias."""

    def quantize(self, rows_TD: Tensor, values_TD: Tensor, scale_TB: Tensor) -> None:
        """Quantize rows for their way between ranks: `rows_TD` ~ `values_TD` * `scale_TB` (float32).

        Both outputs are filled in place and may be views of wider rows. int8 values: B = 1, a row's largest value
        becomes 127. float8_e4m3fn: B = ceil(D / 128), the largest of each 128 values becomes 448.
        """

    def dequantize(self, values_TD: Tensor, scale_TB: Tensor, out_TD: Tensor) -> None:
        """Fill `out_TD` with values * scale, the inverse of `quantize`, in the dtype of `out_TD`."""

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        """rows_SF: silu(gate) * up, gate being the first half of a row and up the second."""

    def expert_mlp(
        self,
        rows_SD: Rows,
        counts_L: Tensor,
        weights: ExpertWeights,
        expected: int | None = None,
        total_L: Tensor | None = None,
    ) -> Tensor:
        """rows_SD: down(activation(gate_up(row))) with the matrices of each row's slot.

        Quantized rows go into W8A8 experts as they are, and are dequantized for others. `expected` is about how many
        rows the counts cover, None for all; it may choose how they are computed. The counts are added to `total_L`
        (int64, in place) on the way.
        """

    def even_split(
        self, replicas: EvenReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> Split:
        """The split of one layer by which an expert's replicas share its tokens equally.

        Gives the same integers as `placement.replica_split.assign` with `even_shares` or `nearest_quota`, whose
        round-robin offset is that of `replicas` plus the number of earlier calls. An id that no expert has is served as
        if it were one that exists, and reported to `id_check`.

        It is an object with state, because the number of earlier calls must lie on the device to advance in replays of
        a CUDA graph.
        """

    def level_split(
        self, replicas: LevelReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> Split:
        """The same with shares that level the ranks' loads; all ranks must call it together.

        Gives the same integers as `placement.replica_split.assign` with `own_quota` of `level_shares`, or of
        `level_by_node_shares` where `replicas.by_node` is set.

        The sources' counts come through the callback `replicas.gather`, not as an argument, because counting is part of
        the split's own launches: with a contract call before the collective and one after it, a large batch would be
        counted twice.
        """
