"""`make test-vendor`: a table of what becomes of somebody else's tests."""

from __future__ import annotations

import pytest

from tests.helpers import vendor_tests
from tests.helpers.ascend import REAL

pytestmark = pytest.mark.ascend

THEIRS = """
import torch
import torch_npu
from torch_npu.testing.testcase import TestCase

class TestTheirs(TestCase):
    def test_right(self):
        assert torch_npu.npu_swiglu(torch.zeros(2, 8).npu()).shape == (2, 4)

    def test_wrong(self):
        self.assertRtolEqual(torch.ones(2), torch.zeros(2))

    def test_more(self):
        torch_npu.npu_dynamic_quant(torch.zeros(2, 8).half().npu(), smooth_scales=torch.ones(8).half().npu())
"""


@pytest.mark.slow
def test_each_test_is_passed_failed_or_not_emulated(npu, tmp_path):
    if npu == REAL:
        pytest.skip("what is not emulated is a matter of the emulation")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "test_npu_swiglu.py").write_text(THEIRS)
    (tmp_path / "test_npu_other.py").write_text("raise SystemExit")
    (file,) = vendor_tests.files(tmp_path)
    found = {
        test.partition(": ")[2]: (outcome, why) for test, outcome, why in vendor_tests.outcomes(file, npu)
    }
    assert {test: outcome for test, (outcome, _) in found.items()} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_more": "not emulated",
    }
    assert found["test_more"][1] == "aclnnDynamicQuantV2: smooth scales are not emulated"


def test_a_folder_without_such_tests_is_refused(npu, tmp_path):
    with pytest.raises(SystemExit, match="name a checkout of op-plugin"):
        vendor_tests.files(tmp_path)
