"""The kernels' contract on a GPU: everything stays on the device, shapes do not depend on the routing.

Every method can be captured in a CUDA graph: no method waits for the GPU or reads anything back from it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights, Permuted
from epbackend.kernels.triton.chip import Chip, chip_of
from epbackend.kernels.triton.grouped import grouped_matmul
from epbackend.kernels.triton.permute import count, permute
from epbackend.kernels.triton.schedule import row_tiles
from epbackend.kernels.triton.swiglu import swiglu
from epbackend.kernels.triton.tiles import Problem, choose_tile
from epbackend.kernels.triton.unpermute import unpermute

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonKernels:
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def __init__(self, chip: Chip | None = None) -> None:
        """`chip` None: the one that a call's tensors live on."""
        self._chip = chip

    count = staticmethod(count)
    permute = staticmethod(permute)
    unpermute = staticmethod(unpermute)
    swiglu = staticmethod(swiglu)

    def pack(self, weights_LNK: Iterable[Tensor]) -> Tensor:
        """weight_LNK as LMDeploy lays it: a contiguous tensor is used where it is, single matrices are stacked."""
        if not isinstance(weights_LNK, Tensor):
            weights_LNK = torch.stack(list(weights_LNK))
        if weights_LNK.dtype not in DTYPES:
            raise ConfigError(
                f"weights are {weights_LNK.dtype}, but device cuda multiplies {', '.join(map(str, DTYPES))}; "
                "convert them, or quantise them with pack_fp8 or pack_int8"
            )
        return weights_LNK.detach().contiguous()

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Tensor, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        return self._multiply(rows_SK, packed, counts_L, bias_LN, gated=False)

    def expert_mlp(self, rows_SD: Tensor, counts_L: Tensor, weights: ExpertWeights) -> Tensor:
        if weights.activation is None:
            rows_SF = self._multiply(rows_SD, weights.gate_up, counts_L, weights.gate_up_bias_L2F, gated=True)
        else:
            rows_SF = weights.activation(
                self._multiply(rows_SD, weights.gate_up, counts_L, weights.gate_up_bias_L2F, gated=False)
            )
        return self._multiply(rows_SF, weights.down, counts_L, weights.down_bias_LD, gated=False)

    def _multiply(
        self, rows_SK: Tensor, weight_LNK: Tensor, counts_L: Tensor, bias_LN: Tensor | None, *, gated: bool
    ) -> Tensor:
        chip = self._chip or chip_of(rows_SK.device)
        tile = choose_tile(chip, Problem.of(rows_SK, weight_LNK, gated))
        schedule = row_tiles(counts_L, len(rows_SK), tile.rows)
        return grouped_matmul(rows_SK, weight_LNK, schedule, tile, chip, gated=gated, bias_LN=bias_LN)
