"""Whole LMDeploy pipelines on NPUs, in the processes that a user has.

Only CANN is emulated: LMDeploy's Ascend backend, dlinfer and torch-npu are the packages themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")

from epbackend.models import resolve
from epbackend.placement.placement import Layout, Placement
from tests.helpers import ascend, ascend_pipeline, ascend_step_log, w8a8_checkpoint
from tests.helpers.answers import NEW_TOKENS, Answer, compare, hugging_face, rounding
from tests.helpers.ascend import REAL, ROOT
from tests.helpers.engines import EAGER
from tests.helpers.patience import PATIENCE_S

pytestmark = [pytest.mark.ascend, pytest.mark.engine]

QWEN, DEEPSEEK = "tiny-qwen3-moe", "tiny-deepseek-v3"
EXPERTS, LAYERS = 32, 4
CHANGES = {"W8A8": (w8a8_checkpoint.round_rows,)}
"""What a form of a checkpoint rounds beside the type (`answers.rounding`)."""
LENGTHS = "lmdeploy.pytorch.backends.dlinfer.ascend.op_backend._get_cpu_attention_metadata"
SIZES = "epbackend.dispatch.collectives.Collectives.all_gather_ints"


def compare_with_float32(
    answers: list[Answer], path: str, dtype: torch.dtype = torch.float16, form: str = ""
) -> None:
    """Fail unless they are Hugging Face's for the same weights in float32, but for the rounding of `dtype` and form."""
    expected = hugging_face(path)
    compare(answers, expected, rounding(path, dtype, expected, *CHANGES.get(form, ())))


def with_copies(folder: Path, ranks: int) -> dict[str, Any]:
    """A placement whose ranks hold unequal numbers of experts: expert 0 is on all, and twice on the last."""
    share = EXPERTS // ranks
    own = [tuple(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    slots = (own[0], *((*each, 0) for each in own[1:-1]), (*own[-1], 0, 0))
    file = folder / "placement.json"
    file.write_text(Placement((Layout(slots, EXPERTS),) * LAYERS).to_json())
    return {"file": str(file), "split": {"prefill": "level", "decode": "even"}}


def assert_waits(of_steps: list[Counter[str]], ours: dict[str, int]) -> None:
    """In each decode step LMDeploy's attention waits for two lengths; of our own functions these alone wait."""
    assert len(of_steps) >= NEW_TOKENS / 2
    for step in of_steps:
        assert step[LENGTHS] == 2
        assert {caller: times for caller, times in step.items() if caller.startswith("epbackend.")} == ours


def test_two_ranks_with_copies_of_an_expert_answer_as_one_process_would_until_one_is_lost(npu, tmp_path):
    """Every token is that of Hugging Face's float32 generate; on A2 decode takes the fused operators."""
    fused = npu == "A2"
    settings = {"ep_level": 2, "placement": with_copies(tmp_path, 2), "timeout_s": PATIENCE_S}
    settings |= {"dispatcher": "mc2"} if fused else {}
    log = tmp_path / "log"
    log.mkdir()
    told = ascend_pipeline.run(npu, 2, QWEN, settings, lose=1, log=log)
    assert [each.tokens for each in told.answers] == [each.tokens for each in hugging_face(resolve(QWEN))]
    compare_with_float32(told.answers, resolve(QWEN))
    facts = told.facts
    assert facts["device"] == "ascend"
    assert facts["dispatcher"] == ({"prefill": "alltoall", "decode": "mc2"} if fused else "alltoall")
    assert all(tokens > 0 for tokens in facts["expert_tokens_per_rank"])
    if npu != REAL:
        for of_a_rank in map(ascend_step_log.decode_waits, ascend_step_log.ranks(log)):
            assert_waits(of_a_rank, {} if fused else {SIZES: LAYERS})
    assert told.failure is not None
    assert "rank 1 was killed by SIGKILL" in told.failure


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float16", "W8A8"])
def test_experts_move_while_answers_stay_the_same(npu, tmp_path, form):
    """Staged at the NPU beside the steps, flipped between two of them; W8A8 in FRACTAL_NZ tiles."""
    settings = {"ep_level": 2, "balance": EAGER, "timeout_s": PATIENCE_S}
    path, whole, dtype = resolve(QWEN), resolve(QWEN), torch.float16
    if form == "W8A8":
        path, whole = map(str, w8a8_checkpoint.write(QWEN, tmp_path))
        settings, dtype = settings | {"engine": {"dtype": "bfloat16"}}, torch.bfloat16
    told = ascend_pipeline.run(npu, 2, path, settings, migrations=3)
    expected = hugging_face(whole)
    off = rounding(whole, dtype, expected, *CHANGES.get(form, ()))
    for answers in (told.answers, *told.later):
        compare(answers, expected, off)
    assert told.moved["migrations"] >= 3
    assert told.moved["failed"] == 0
    assert told.moved["bytes_moved"] > 0


@pytest.mark.slow
def test_four_ranks_of_which_each_holds_a_copy(npu, tmp_path):
    told = ascend_pipeline.run(npu, 4, QWEN, {"ep_level": 2, "placement": with_copies(tmp_path, 4)})
    compare_with_float32(told.answers, resolve(QWEN))
    assert told.facts["dispatcher"] == "alltoall"
    assert all(tokens > 0 for tokens in told.facts["expert_tokens_per_rank"])


@pytest.mark.slow
def test_ranks_in_actors_of_ray(npu):
    """In a Ray that ran before, where LMDeploy takes the NPU of a rank's number."""
    told = ascend_pipeline.run(npu, 2, QWEN, {"ep_level": 2, "engine": {"executor": "ray"}})
    compare_with_float32(told.answers, resolve(QWEN))
    assert told.facts["dispatcher"] == "alltoall"
    assert all(tokens > 0 for tokens in told.facts["expert_tokens_per_rank"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["W8A8", "bfloat16"])
@pytest.mark.parametrize("model", [QWEN, DEEPSEEK])
def test_log_probabilities_are_as_exact_as_bfloat16(npu, tmp_path, model, form):
    """Of the same weights in float32; W8A8 in the form that LMDeploy's own tool writes."""
    path = whole = resolve(model)
    if form == "W8A8":
        path, whole = map(str, w8a8_checkpoint.write(model, tmp_path))
    told = ascend_pipeline.run(npu, 2, path, {"ep_level": 2, "engine": {"dtype": "bfloat16"}})
    compare_with_float32(told.answers, whole, torch.bfloat16, form)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "level"), [(1, 1), (2, 1), (2, 2)])
def test_latent_attention(npu, ranks, level):
    """DeepSeek-V3's; long prompts come in parts, the later ones beside a cache."""
    settings = {"ep_level": level, "engine": {"max_prefill_token_num": 32}}
    fused = npu == "A2" and level == 2
    settings |= {"dispatcher": "mc2"} if fused else {}
    told = ascend_pipeline.run(npu, ranks, DEEPSEEK, settings)
    compare_with_float32(told.answers, resolve(DEEPSEEK))
    named = "alltoall" if level == 2 else "replicated"
    assert told.facts["dispatcher"] == ({"prefill": named, "decode": "mc2"} if fused else named)


def demonstrated(npu: str, ranks: int, level: int) -> dict:
    """What `make demo-ascend` prints last, with these settings."""
    command = [sys.executable, "-m", "tests.helpers.ascend_demo", "--device", npu, "--tokens", "6"]
    command += ["--ranks", str(ranks), "--level", str(level)]
    done = subprocess.run(
        command, cwd=ROOT, env=ascend.outside(), capture_output=True, text=True, timeout=10 * PATIENCE_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "level", "dispatcher"), [(1, 1, "replicated"), (2, 1, "replicated"), (4, 2, "alltoall")]
)
def test_the_demo_with_other_numbers_of_ranks(npu, ranks, level, dispatcher):
    found = demonstrated(npu, ranks, level)
    assert found["tokens_identical"]
    assert found["dispatcher"] == dispatcher
    assert found["dlinfer"]
    assert found["torch_npu"]
