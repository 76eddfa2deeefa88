"""docs/ascend.md shows what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ascend_traffic
from tests.helpers import ascend_step_log
from tests.helpers.ascend_call_log import layer_calls, markdown

DOCS = (Path(__file__).parents[2] / "docs" / "ascend.md").read_text()


@pytest.mark.cpu
@pytest.mark.parametrize("table", [ascend_traffic.markdown(), ascend_traffic.overlap_markdown()])
def test_documented_tables_are_what_the_traffic_model_computes(table):
    assert table in DOCS, "paste the output of python -m benchmarks.ascend_traffic"


@pytest.mark.ascend
def test_documented_calls_are_those_of_a_layer(ranks, npu):
    if npu != "A3":
        pytest.skip("the docs show the calls on A3")
    assert markdown(ranks.run) in DOCS, "paste the output of python -m tests.helpers.ascend_call_log"


@pytest.mark.ascend
@pytest.mark.engine
@pytest.mark.slow
def test_documented_steps_are_those_of_a_model(npu):
    if npu != ascend_step_log.CHIP:
        pytest.skip(f"the docs show the steps on {ascend_step_log.CHIP}")
    for table in ascend_step_log.tables():
        assert table in DOCS, "paste the output of python -m tests.helpers.ascend_step_log"


@pytest.mark.ascend
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "W8A8"])
@pytest.mark.parametrize("dispatcher", ["replicated", "mc2", "mc2, int8 rows"])
def test_a_step_that_never_waits_for_the_device(ranks, npu, dispatcher, int8):
    if npu == "npu":
        pytest.skip("only the emulation notes what waits")
    assert [waits for _, waits in ranks.run(2, layer_calls, dispatcher, int8)] == [[], []]
