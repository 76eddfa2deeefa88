"""Whole LMDeploy pipelines on NPUs, in the processes that a user has.

Only CANN is emulated: LMDeploy's Ascend backend, dlinfer and torch-npu are the packages themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.ascend import ROOT
from tests.helpers.patience import PATIENCE_S

pytestmark = [pytest.mark.ascend, pytest.mark.engine]


def answered(npu: str, ranks: int, level: int, *arguments: str) -> dict:
    """What `make demo-ascend` prints last, with these settings."""
    command = [sys.executable, "-m", "tests.helpers.ascend_demo", "--device", npu, "--tokens", "6"]
    command += ["--ranks", str(ranks), "--level", str(level), *arguments]
    # As a user starts it, without what the emulation set in this process.
    environment = {
        name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=10 * PATIENCE_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_ranks_that_send_rows_answer_as_one_process_would(npu):
    """Every token is that of Hugging Face's float32 generate; on A2 decode takes the fused operators."""
    fused = npu == "A2"
    found = answered(npu, 2, 2, *(("--dispatcher", "mc2") if fused else ()))
    assert found["tokens_identical"]
    assert found["device"] == "ascend"
    assert (found["ranks"], found["ep_level"]) == (2, 2)
    assert found["dispatcher"] == ({"prefill": "alltoall", "decode": "mc2"} if fused else "alltoall")
    assert all(tokens > 0 for tokens in found["expert_tokens_per_rank"])
    assert found["dlinfer"]
    assert found["torch_npu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "level", "dispatcher"), [(1, 1, "replicated"), (2, 1, "replicated"), (4, 2, "alltoall")]
)
def test_other_numbers_of_ranks(npu, ranks, level, dispatcher):
    found = answered(npu, ranks, level)
    assert found["tokens_identical"]
    assert found["dispatcher"] == dispatcher
