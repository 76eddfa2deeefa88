"""Calls that break an operator's documented limits fail: the emulation is as strict as the documentation.

On real NPUs these would be CANN's own refusals, or garbage; so they run on the emulation alone.
"""

from __future__ import annotations

import pytest
import torch

from epbackend.device.ascend import AscendDevice
from epbackend.dispatch.mc2 import LIMITS
from epbackend.errors import ConfigError
from epbackend.kernels import int8
from epbackend.kernels.npu.kernels import NpuKernels, ops
from tests.helpers.ascend import REAL

pytestmark = pytest.mark.ascend


@pytest.fixture(autouse=True)
def _emulated(npu):
    if npu == REAL:
        pytest.skip("the limits of real operators are CANN's to check")


def npu_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="npu")


def group(**changes) -> ops.FusedGroup:
    fields = {"communicator": "nobody", "rank": 0, "size": 2, "slots": 4, "tokens": 4, "algorithm": ""}
    return ops.FusedGroup(**{**fields, **changes})


def dispatch(hidden: int, **changes) -> ops.FusedRows:
    ids_TK = torch.arange(2, dtype=INT32).repeat(4, 1).npu()
    chip = LIMITS[AscendDevice().chip]
    return ops.moe_dispatch(
        npu_tensor(4, hidden),
        ids_TK,
        torch.ones(4, dtype=torch.bool).npu(),
        group(algorithm=chip.algorithm, **changes),
        int8=False,
    )


def product(rows_SK: torch.Tensor, ends_L: torch.Tensor, bias_LN: torch.Tensor | None = None) -> torch.Tensor:
    return ops.grouped_matmul(rows_SK, npu_tensor(2, 8, 4), ends_L, bias_LN, torch.bfloat16)


def tiles(*shape: int) -> torch.Tensor:
    found = ops.fractal_nz(npu_tensor(*shape, dtype=INT8))
    assert found is not None
    return found


def latent_attention(size: int, values: int, block: int, keys: int = 1) -> None:
    """A decode step of MLA, whose cache has two blocks."""
    torch.ops.atb._npu_paged_attention_mla(
        query=npu_tensor(1, 4, size),
        key_cache=npu_tensor(2, block, 1, size),
        num_kv_heads=1,
        num_heads=4,
        scale_value=1.0,
        block_table=npu_tensor(1, 2, dtype=INT32),
        context_lens=torch.full((1,), keys, dtype=INT32),
        mla_vheadsize=values,
        out=npu_tensor(1, 4, values),
    )


def latent_prefill(mask: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Of two requests with one and two tokens."""
    torch.ops.atb._npu_flash_attention(
        query=npu_tensor(3, 4, 80, dtype=dtype),
        key=npu_tensor(3, 1, 80, dtype=dtype),
        value=npu_tensor(3, 1, 64, dtype=dtype),
        mask=mask.to(dtype).npu(),
        seq_len=torch.tensor([1, 2], dtype=INT32),
        scale_value=1.0,
        num_heads=4,
        num_kv_heads=1,
        out=npu_tensor(3, 4, 64, dtype=dtype),
    )


INT8, INT32, INT64, FLOAT32 = torch.int8, torch.int32, torch.int64, torch.float32
WRONG = {
    "ids must be int32": (
        lambda: ops.init_routing(npu_tensor(4, 16), npu_tensor(4, 2, dtype=INT64), 4, 3),
        "int32|Int",
    ),
    "ids within the experts": (
        lambda: ops.init_routing(npu_tensor(4, 16), npu_tensor(4, 2, dtype=INT32) + 5, 4, 3),
        "not within expert_num",
    ),
    "active experts within all": (
        lambda: ops.init_routing(npu_tensor(4, 16), npu_tensor(4, 2, dtype=INT32), 4, 5),
        "active_expert_range",
    ),
    "inner dimensions fit": (
        lambda: ops.grouped_matmul(
            npu_tensor(4, 16), npu_tensor(2, 8, 4), npu_tensor(2, dtype=INT64), None, torch.bfloat16
        ),
        "does not fit weight",
    ),
    "a bfloat16 bias is float32": (
        lambda: ops.grouped_matmul(
            npu_tensor(4, 8),
            npu_tensor(2, 8, 4),
            npu_tensor(2, dtype=INT64),
            npu_tensor(2, 4),
            torch.bfloat16,
        ),
        "bias for torch.bfloat16 must be torch.float32",
    ),
    "groups end within the rows": (
        lambda: ops.grouped_matmul(
            npu_tensor(4, 8), npu_tensor(2, 8, 4), npu_tensor(2, dtype=INT64) + 5, None, torch.bfloat16
        ),
        "past the 4 rows",
    ),
    "one group for each matrix": (
        lambda: ops.grouped_matmul(
            npu_tensor(4, 8), npu_tensor(2, 8, 4), npu_tensor(3, dtype=INT64), None, torch.bfloat16
        ),
        "3 groups, but 2 matrices",
    ),
    "rows to quantize are 16-bit": (
        lambda: ops.dynamic_quant(npu_tensor(4, 8, dtype=FLOAT32)),
        "float32|half",
    ),
    "fused widths are multiples of 64": (
        lambda: ops.dequant_swiglu_quant(
            npu_tensor(4, 80, dtype=INT32),
            npu_tensor(2, 80, dtype=FLOAT32),
            npu_tensor(4, dtype=FLOAT32),
            npu_tensor(2, dtype=INT64),
        ),
        "multiple of 64",
    ),
    "fused weights are tiled": (
        lambda: ops.grouped_matmul_swiglu_quant(
            npu_tensor(4, 32, dtype=INT8),
            npu_tensor(4, dtype=FLOAT32),
            npu_tensor(2, 32, 64, dtype=INT8),
            npu_tensor(2, 64, dtype=FLOAT32),
            npu_tensor(2, dtype=INT64),
        ),
        "int8 weights must be FRACTAL_NZ",
    ),
    "tiled weights have at most 10240 columns": (
        lambda: ops.grouped_matmul_swiglu_quant(
            npu_tensor(4, 16, dtype=INT8),
            npu_tensor(4, dtype=FLOAT32),
            tiles(1, 16, 10272),
            npu_tensor(1, 10272, dtype=FLOAT32),
            npu_tensor(1, dtype=INT64),
        ),
        "10272 columns are more than 10240",
    ),
    "swiglu takes no empty tensor": (lambda: ops.swiglu(npu_tensor(0, 8)), "empty tensors are not supported"),
    "tiles are emulated for int8 alone": (
        lambda: ops.fractal_nz(npu_tensor(1, 16, 32, dtype=INT32)),
        "FRACTAL_NZ is emulated for int8 alone",
    ),
    "asymmetric quantization is not emulated": (
        lambda: torch.ops.npu.npu_dynamic_quant_asymmetric(npu_tensor(4, 8)),
        "asymmetric quantization is not emulated",
    ),
    "unpermute's indices are rows": (
        lambda: ops.token_unpermute(npu_tensor(2, 8), npu_tensor(8, dtype=INT32) + 2, npu_tensor(4, 2)),
        "outside permuted_tokens",
    ),
    "latent keys have at most 576 columns": (lambda: latent_attention(592, 512, 128), "592, 512.* 1 to 576"),
    "blocks of large heads hold at most 128 tokens": (lambda: latent_attention(576, 512, 256), "above 128"),
    "keys fit their blocks": (lambda: latent_attention(80, 64, 128, keys=257), "257 keys in 2 blocks"),
    "a mask has the longest request's sides": (
        lambda: latent_prefill(torch.ones(3, 3).triu(1)),
        r"mask \(3, 3\) is not \[2, 2\]",
    ),
    "a float16 mask is minus infinity": (
        lambda: latent_prefill(torch.ones(2, 2).triu(1), torch.float16),
        "a mask that is not -inf above its diagonal",
    ),
    "a communicator must be there": (lambda: dispatch(1024), "no communicator is called 'nobody'"),
    "hidden sizes have limits": (lambda: dispatch(9000), "hidden size 9000"),
    "experts have limits": (lambda: dispatch(1024, slots=600), "1200 experts on 2 ranks"),
    "no more ranks than A2 and A3 take": (lambda: dispatch(1024, size=1000, slots=1), "ep_world_size 1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused_by_the_emulation(name):
    call, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.empty(1025, 2, 2), "may hold 1024 experts, and holds 1025; raise ep_size"),
        (torch.empty(1, 2, 65536), "2 x 65536; its sides must be below 65536"),
        (
            torch.empty(1, 2, 2, dtype=torch.float64),
            "torch.float64 are not supported; set engine.dtype: bfloat16",
        ),
    ],
)
def test_matrices_that_npus_cannot_multiply_are_refused(matrices, message):
    with pytest.raises(ConfigError, match=message):
        NpuKernels().prepack(matrices)


def test_float32_rows_of_int8_experts_are_refused():
    packed = NpuKernels().prepack([int8.Int8Matrix.of(torch.randn(8, 16))])
    with pytest.raises(ConfigError, match=r"not torch\.float32; set engine.dtype: bfloat16"):
        NpuKernels().grouped_matmul(npu_tensor(4, 16, dtype=FLOAT32), packed, npu_tensor(1, dtype=INT64))


def test_biases_of_int8_experts_are_refused():
    kernels = NpuKernels()
    weights = [int8.Int8Matrix.of(torch.randn(8, 16)) for _ in range(2)]
    packed = kernels.prepack([int8.Int8Matrix(each.values_NK.npu(), each.scale_N.npu()) for each in weights])
    with pytest.raises(ConfigError, match="W8A8 experts with biases are not supported; use bfloat16 weights"):
        kernels.grouped_matmul(npu_tensor(4, 16), packed, npu_tensor(2, dtype=INT64), npu_tensor(2, 8))


def test_an_operator_that_is_not_emulated_says_its_name():
    import torch_npu

    with pytest.raises(RuntimeError, match="aclnnMoeReRouting"):
        torch_npu.npu_moe_re_routing(npu_tensor(4, 16), npu_tensor(2, 2, dtype=INT32))
