"""Rows in 8 bits, by every device's kernels: as near to the original rows as docs/architecture.md promises."""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels.fp8 import BLOCK, FP8
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.row_tolerance import within

WIDTHS = [1, 40, 128, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[torch.int8, FP8], ids=["int8", "fp8"])
def values_dtype(request, device):
    if (device.name, request.param) == ("ascend", FP8):
        pytest.skip("Ascend A2 and A3 have no float8")
    return request.param


def views(
    values_dtype: torch.dtype, rows: int, width: int, place: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales that lie in wider rows of bytes, as a dispatcher sends them."""
    scales = 4 * (-(-width // BLOCK) if values_dtype == FP8 else 1)
    bytes_TB = torch.zeros(
        rows, 8 + scales + -(-width // 8) * 8 + scales % 8, dtype=torch.uint8, device=place
    )
    values = bytes_TB[:, 8 + scales : 8 + scales + width].view(values_dtype)
    return values, bytes_TB[:, 8 : 8 + scales].view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_dequantized_rows_are_near_the_original(kernels, place, values_dtype, width, dtype):
    normal_TD = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    rows_TD = (normal_TD * torch.logspace(-3, 2, 7).unsqueeze(1)).to(dtype)
    rows_TD[2] = 0
    values_TD, scale_TB = views(values_dtype, 7, width, place)
    kernels.quantize(rows_TD.to(place), values_TD, scale_TB)
    out_TD = torch.empty(7, width, dtype=dtype, device=place)
    kernels.dequantize(values_TD, scale_TB, out_TD)
    off_TD = (out_TD.cpu().double() - rows_TD.double()).abs()
    near_TD = within("fp8" if values_dtype == FP8 else "int8", rows_TD).double()
    if dtype == torch.bfloat16:  # Triton's interpreter cuts off where a GPU rounds
        near_TD += rows_TD.abs() * 2**-8
    assert (off_TD <= near_TD).all()
    assert not out_TD[2].any()


def test_no_rows_are_quantized_without_error(kernels, place, values_dtype):
    values_TD, scale_TB = views(values_dtype, 0, 40, place)
    kernels.quantize(torch.empty(0, 40, device=place), values_TD, scale_TB)
    kernels.dequantize(values_TD, scale_TB, torch.empty(0, 40, device=place))


@pytest.mark.cpu
def test_a_gpu_without_float8_converts_by_torch():
    pytest.importorskip("triton", reason="triton is not installed")
    from epbackend.kernels.triton.kernels import TritonKernels
    from epbackend.kernels.triton.tiles import A100

    place = torch.device("cpu")
    rows_TD = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    found, expected = views(FP8, 3, 200, place), views(FP8, 3, 200, place)
    TritonKernels(A100).quantize(rows_TD, *found)
    ReferenceKernels().quantize(rows_TD, *expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.float(), theirs.float())
    out_TD = torch.empty(3, 200)
    TritonKernels(A100).dequantize(*found, out_TD)
    assert ((out_TD - rows_TD).abs() <= within("fp8", rows_TD)).all()
