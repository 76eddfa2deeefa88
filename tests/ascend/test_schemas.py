"""Every call of ours is one that torch-npu 2.9, 2.10, 2.13 and 2.14 accept (schemas.json: scripts/ascend_schemas.py).

Needs neither a wheel nor an NPU: the calls are caught before they reach torch_npu.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from epbackend.kernels.npu import ops

SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text())
HIDDEN, IDS, FLAT = torch.empty(4, 8), torch.empty(4, 2, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
WEIGHT, ENDS, SCALES = torch.empty(2, 8, 6), torch.empty(2, dtype=torch.int64), torch.empty(2, 6)
GROUP = ops.FusedGroup("name", rank=0, size=2, slots=4, tokens=4, algorithm="")
SENT = ops.FusedRows(HIDDEN, ENDS, FLAT, FLAT, None, HIDDEN[0])
CALLS = {
    "npu_moe_init_routing_v2": lambda: ops.init_routing(HIDDEN, IDS, 5, 4),
    "npu_moe_token_unpermute": lambda: ops.token_unpermute(HIDDEN, FLAT, HIDDEN),
    "npu_grouped_matmul": lambda: ops.grouped_matmul(HIDDEN, WEIGHT, ENDS, SCALES, torch.bfloat16),
    "npu_grouped_matmul, int8": lambda: ops.grouped_matmul_scaled(
        HIDDEN, SCALES[0], WEIGHT, SCALES, ENDS, torch.bfloat16
    ),
    "npu_format_cast": lambda: ops.format_cast(WEIGHT, ops.FRACTAL_NZ),
    "npu_grouped_matmul_swiglu_quant_v2": lambda: ops.grouped_matmul_swiglu_quant(
        HIDDEN, SCALES[0], WEIGHT, SCALES, ENDS
    ),
    "npu_moe_gating_top_k": lambda: ops.sigmoid_top_k(HIDDEN, HIDDEN[0], 2, 4, 2, 2.5),
    "npu_swiglu": lambda: ops.swiglu(HIDDEN),
    "npu_dynamic_quant": lambda: ops.dynamic_quant(HIDDEN),
    "npu_dequant_swiglu_quant": lambda: ops.dequant_swiglu_quant(HIDDEN, SCALES, SCALES[0], ENDS),
    "npu_moe_distribute_dispatch_v2": lambda: ops.moe_dispatch(
        HIDDEN, IDS, HIDDEN[:, 0] > 0, GROUP, int8=True
    ),
    "npu_moe_distribute_combine_v2": lambda: ops.moe_combine(
        HIDDEN, IDS, HIDDEN, HIDDEN[:, 0] > 0, SENT, GROUP
    ),
}


class CaughtError(Exception):
    """A call that was about to be made."""

    def __init__(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        self.name, self.args_given, self.kwargs_given = name, args, kwargs


class FakeNpu:
    def __getattr__(self, name: str):
        def catch(*args, **kwargs):
            raise CaughtError(name, args, kwargs)

        return catch


@pytest.mark.cpu
@pytest.mark.parametrize("version", SCHEMAS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_fits_every_version(monkeypatch, call, version):
    monkeypatch.setattr(ops, "_npu", FakeNpu)
    with pytest.raises(CaughtError) as caught:
        CALLS[call]()
    made = caught.value
    assert made.name == call.split(",")[0]
    schema = torch._C.parse_schema(f"npu::{SCHEMAS[version][made.name]}")
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert len(made.args_given) <= len(positional)
    given = dict(zip([argument.name for argument in positional], made.args_given, strict=False))
    assert not given.keys() & made.kwargs_given.keys()
    given.update(made.kwargs_given)
    known = {argument.name: argument for argument in schema.arguments}
    assert given.keys() <= known.keys()
    for name, argument in known.items():
        assert name in given or argument.has_default_value(), f"{name} is missing"
        assert name not in given or fits(given[name], str(argument.type)), f"{name} must be {argument.type}"


def fits(value: Any, wanted: str) -> bool:
    """Whether a value can be passed for a type of a schema; types of data are integers to torch's dispatcher."""
    if wanted.startswith("Optional["):
        return value is None or fits(value, wanted.removeprefix("Optional[").removesuffix("]"))
    if wanted.startswith("List["):
        item = wanted.removeprefix("List[").removesuffix("]")
        return isinstance(value, list) and all(fits(each, item) for each in value)
    kinds = {"Tensor": torch.Tensor, "int": int | torch.dtype, "str": str, "bool": bool, "float": float}
    return isinstance(value, kinds[wanted])


@pytest.mark.cpu
def test_every_operator_is_checked():
    assert {call.split(",")[0] for call in CALLS} == set(next(iter(SCHEMAS.values())))
