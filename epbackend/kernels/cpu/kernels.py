"""Experts on a CPU: the reference, with the products that are fastest on this processor.

Prepacked matrices of floats are `Packed`; quantized ones stay as they are given, and their products are `compiled`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import Permuted, Prepacked, fp8, int8, renormalized
from epbackend.kernels.cpu import products
from epbackend.kernels.cpu.choice import Method, choose, compiler_trouble
from epbackend.kernels.reference import ReferenceKernels
from epbackend.kernels.weight_formats import Matrices, check_float, check_width, stacked

BLOCK_ROWS = 256


@dataclass(frozen=True)
class Packed:
    """The matrices of L slots, in the layout of a method: each memory of its own, so that one slot can be replaced."""

    matrices_L: list[Tensor]
    method: Method
    behind_first_L: np.ndarray
    """Bytes from the first one's address to each (int64), in the plain layout. Addresses themselves do not stay: torch
    moves a tensor in place when it comes to be shared with another process, and all matrices of one tensor with it."""

    def __len__(self) -> int:
        return len(self.matrices_L)

    @property
    def at_L(self) -> np.ndarray:
        """Where the matrices are now (int64), in the plain layout."""
        return self.matrices_L[0].data_ptr() + self.behind_first_L

    @property
    def dtype(self) -> torch.dtype | None:
        return self.matrices_L[0].dtype if self.matrices_L else None

    @property
    def depth(self) -> int:
        """K of the matrices."""
        return self.matrices_L[0].shape[1]


class CpuKernels(ReferenceKernels):
    """Faster than the reference, and right on every processor: what it has no fast product of, it widens to float32."""

    def __init__(self, product: str = "auto") -> None:
        """`product` is one of `choice.PRODUCTS`, or "auto": the one that was the fastest in a measurement here."""
        self._product = product

    def prepack(self, weights_LNK: Matrices) -> Prepacked:
        if isinstance(weights_LNK, fp8.Fp8Blocks | int8.Int8Weights):
            return stacked(weights_LNK)
        # Slots that share memory could not be replaced one by one.
        in_place = isinstance(weights_LNK, Tensor) and weights_LNK.is_contiguous()
        method, first = None, None
        packed: list[Tensor] = []
        for weight in (matrices := iter(weights_LNK)):
            if isinstance(weight, int8.Int8Matrix):
                return stacked([weight, *matrices])
            if first is None or method is None:
                check_float(weight.dtype, "cpu")
                method, first = choose(weight.dtype, self._product), weight
            if (weight.shape, weight.dtype) != (first.shape, first.dtype):
                raise ConfigError(
                    f"experts are matrices of one shape and dtype; the first is {list(first.shape)} in {first.dtype}, "
                    f"another {list(weight.shape)} in {weight.dtype}"
                )
            packed.append(_packed(weight.detach(), method, in_place))
        at_L = np.array(
            [0 if weight_NK.is_mkldnn else weight_NK.data_ptr() for weight_NK in packed], np.int64
        )
        return Packed(packed, method or Method.of("library"), at_L - at_L[:1])

    def slot_memory(self, packed: Prepacked, slot: int) -> list[Tensor]:
        if isinstance(packed, Packed):
            return [products.bytes_of(packed.matrices_L[slot])]
        return super().slot_memory(packed, slot)

    def slot_layout(self, packed: Prepacked) -> str:
        return packed.method.layout if isinstance(packed, Packed) else super().slot_layout(packed)

    def permute(
        self,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        slots: int,
        window: tuple[int, int] | None = None,
        expected: int | None = None,
    ) -> Permuted:
        """As the reference, by NumPy, whose calls on few numbers take less time than torch's."""
        choices = slot_ids_TK.shape[1]
        # Ids of other ranks, the negative ones too, sort last; NumPy sorts 16 bits in linear time.
        bucket_S = np.minimum(slot_ids_TK.numpy().astype(np.uint64), slots).astype(np.uint16).reshape(-1)
        counts_L = np.bincount(bucket_S, minlength=slots + 1)[:slots]
        ends_L = counts_L.cumsum()
        first, last = window or (0, len(bucket_S))
        order_S = bucket_S.argsort(kind="stable")[first : min(last, ends_L[-1])]
        if window:
            counts_L = ends_L.clip(first, last) - (ends_L - counts_L).clip(first, last)
        rows_SD = hidden_TD.index_select(0, torch.from_numpy(order_S // choices))
        return Permuted(rows_SD, torch.from_numpy(counts_L), torch.from_numpy(order_S))

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        """Block by block: a float32 copy of all rows at once costs page faults, and memory that no cutoff bounds."""
        blocks = zip(rows_SD.split(BLOCK_ROWS), choice_of_row_S.split(BLOCK_ROWS), strict=True)
        for rows_MD, choice_of_row_M in blocks:
            super().unpermute(rows_MD, choice_of_row_M, weights_TK, out_TD)

    def weighted_sums(
        self,
        rows_SD: Tensor,
        permuted: Permuted,
        weights_TK: Tensor,
        dtype: torch.dtype,
        renormalize: bool = False,
    ) -> Tensor:
        choice_of_row_S = permuted.choice_of_row_S
        if len(weights_TK) != 1 or choice_of_row_S.numpy().min(initial=0) < 0:
            return super().weighted_sums(rows_SD, permuted, weights_TK, dtype, renormalize)
        if renormalize:
            weights_TK = renormalized(weights_TK)
        # All rows are of one token, as where one stream decodes, and none is garbage.
        return torch.mv(rows_SD.float().t(), weights_TK.take(choice_of_row_S).float()).to(dtype).unsqueeze(0)

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Prepacked, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        check_width(rows_SK, packed.depth if isinstance(packed, Packed) else packed.values_LNK.shape[2])
        if not isinstance(packed, Packed) and compiler_trouble():
            return super().grouped_matmul(rows_SK, packed, counts_L, bias_LN)
        rows_L = counts_L.numpy()
        last_L = rows_L.cumsum()
        first_L = last_L - rows_L
        if isinstance(packed, Packed):
            out_SN = _products(rows_SK, packed, first_L, last_L)
        else:
            out_SN = _quantized_products(rows_SK, packed, first_L, last_L)
        if bias_LN is not None:
            out_SN[: last_L[-1]] += bias_LN.repeat_interleave(counts_L, 0)
        return out_SN.to(rows_SK.dtype)


def _packed(weight_NK: Tensor, method: Method, in_place: bool) -> Tensor:
    if method.layout == "onednn":
        return products.reordered(weight_NK)
    # A matrix that comes alone may be a view of memory that its owner frees.
    weight_NK = weight_NK if in_place else weight_NK.clone(memory_format=torch.contiguous_format)
    products.use_huge_pages(weight_NK.data_ptr(), weight_NK.nbytes)
    return weight_NK


def _products(rows_SK: Tensor, packed: Packed, first_L: np.ndarray, last_L: np.ndarray) -> Tensor:
    """rows_SN, in the dtype of the rows or in float32; each slot by the product that its number of rows asks for."""
    method, matrices_L = packed.method, packed.matrices_L
    outputs = matrices_L[0].shape[0]
    if method.layout == "onednn":
        out_SN = rows_SK.new_empty(len(rows_SK), outputs)
        products.onednn(rows_SK, matrices_L, first_L, last_L, out_SN, method.fewest_rows)
        return out_SN
    # Slots by one product have their first rows there, and none by the other.
    border_L = np.where(method.compiled(last_L - first_L), last_L, first_L)
    if (border_L == first_L).all():
        out_SN = rows_SK.new_empty(len(rows_SK), outputs)
    else:
        at_L = packed.at_L[: len(first_L)]
        out_SN = products.compiled(rows_SK, at_L, first_L, border_L, matrices_L[0].dtype, outputs)
    if (border_L < last_L).any():
        out_SN = out_SN.to(rows_SK.dtype)
        products.library(rows_SK, matrices_L, border_L, last_L, out_SN)
    return out_SN


def _quantized_products(
    rows_SK: Tensor, packed: fp8.Fp8Blocks | int8.Int8Weights, first_L: np.ndarray, last_L: np.ndarray
) -> Tensor:
    """rows_SN (float32) as the reference of the format has it; float8's sums are of another order."""
    values_LNK = packed.values_LNK
    slots, outputs, depth = values_LNK.shape
    at_L = values_LNK.data_ptr() + np.arange(slots, dtype=np.int64) * (outputs * depth)
    where = at_L[: len(first_L)], first_L, last_L, values_LNK.dtype, outputs
    if isinstance(packed, int8.Int8Weights):
        values_SK, scale_S = int8.quantize_rows(rows_SK)
        sums_SN = products.compiled(values_SK, *where, packed.scale_LN.unsqueeze(2))
        return sums_SN.mul_(scale_S.unsqueeze(1))
    return products.compiled(fp8.rounded(rows_SK), *where, packed.scale_LBB)
