"""The benchmark for NPUs runs, at sizes that an emulation can compute. Its times mean nothing here."""

from __future__ import annotations

import pytest

from benchmarks import ascend_layer
from epbackend.device import get_device
from epbackend.dispatch.base import RankGroup

SIZES = {"experts": 8, "hidden": 1024, "width": 64, "top_k": 2}


def milliseconds(groups: dict[int, RankGroup], way: str, int8: bool) -> float:
    place = get_device("ascend").torch_device(groups[1].rank)
    return ascend_layer.measure(groups[1], place, SIZES, 4, way, int8)


@pytest.mark.ascend
@pytest.mark.parametrize("way", ascend_layer.ways(1))
@pytest.mark.parametrize(
    "int8", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["bfloat16", "int8"]
)
def test_each_way_is_measured(ranks, npu, way, int8):
    assert all(ms > 0 for ms in ranks.run(2, milliseconds, way, int8))
