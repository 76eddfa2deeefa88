"""LMDeploy pipelines with the tiny models that come along, on one rank and on two that share a device.

On a machine with GPUs: `make e2e-cuda`. One GPU is enough: ranks are then joined by `peer_group`, with two GPUs by
NCCL. What is compared are the engine's own log-probabilities of the tokens that it chose, with Hugging Face's for the
same text in float32: LMDeploy runs GPUs in 16 bits only, where tokens may differ at near-ties.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "lmdeploy", reason="LMDeploy is not installed; make gather-gpu brings it to a GPU machine"
)

from lmdeploy import GenerationConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import epbackend
from epbackend import EPConfig
from epbackend.device.cuda import CudaDevice
from tests.helpers.shared_gpu import on_shared_devices

MODELS = Path(epbackend.__file__).parent / "models"
TEXTS = ["Once upon a time", "hello", "The little dog ran to the house and", "One day, a girl named Sue " * 9]
NEW_TOKENS = 16
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True, logprobs=1)
ENGINE = {
    "session_len": 256,
    "cache_blocks": 64,
    "log_level": "ERROR",
    "extra": {"logprobs_mode": "raw_logprobs"},
}
ROUNDING = {"float32": 1e-4, "bfloat16": 0.15}
"""Of a log-probability; 4e-6 and 0.04 were seen on a CPU."""


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, which ranks share where there is one only."""
    device = CudaDevice()
    if reason := device.unavailable():
        pytest.skip(f"cuda: {reason}")
    if device.emulated:
        pytest.skip("cuda: LMDeploy's own kernels want a real GPU, and this is Triton's interpreter")
    if torch.cuda.device_count() < 2:
        on_shared_devices(monkeypatch)


@cache
def hugging_face(model: str) -> tuple[Any, Any]:
    path = MODELS / model
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32
    )


def check(model: str, dtype: str, config: dict[str, Any]) -> Any:
    """Fail unless every token chosen has the log-probability that it should, and is the likeliest but for rounding."""
    tokenizer, reference = hugging_face(model)
    engine = ENGINE | {"dtype": dtype} | config.pop("engine", {})
    with epbackend.pipeline(str(MODELS / model), EPConfig.load(config | {"engine": engine})) as pipe:
        answers = pipe(TEXTS, gen_config=GREEDY, do_preprocess=False)
        load = pipe.load()
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = tokenizer(text).input_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([ids + answer.token_ids])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        told = torch.tensor(
            [by_token[token] for by_token, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        )
        assert len(answer.token_ids) == NEW_TOKENS
        torch.testing.assert_close(told, chosen, rtol=0, atol=ROUNDING[dtype])
        assert (expected.amax(1) - chosen).max() < 2 * ROUNDING[dtype]
    return load


@pytest.mark.cpu
@pytest.mark.engine
def test_two_ranks_of_a_cpu_joined_as_on_one_gpu(monkeypatch):
    """The harness of the tests below, where it can run everywhere."""
    on_shared_devices(monkeypatch)
    levels = {"prefill": 2, "decode": 1}
    load = check("tiny_qwen3_moe", "float32", {"device": "cpu", "ep_size": 2, "ep_level": levels})
    assert {phase: choice["name"] for phase, choice in load.dispatchers.items()} == {
        "prefill": "alltoall",
        "decode": "replicated",
    }


@pytest.mark.cuda
@pytest.mark.engine
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("model", ["tiny_qwen3_moe", "tiny_deepseek_v3"])
@pytest.mark.parametrize(
    ("ep", "level", "dispatcher"),
    [(1, 1, "replicated"), (2, 1, "replicated"), (2, 2, "symmetric"), (2, 2, "alltoall")],
)
def test_on_gpus(gpu, ep, level, dispatcher, model, eager):
    settings = {"device": "cuda", "ep_size": ep, "ep_level": level}
    if ep > 1:
        settings["dispatcher"] = dispatcher
    load = check(model, "bfloat16", settings | {"engine": {"eager_mode": eager}})
    assert {choice["name"] for choice in load.dispatchers.values()} == {dispatcher}
    assert load.tokens_RLE.any(axis=(1, 2)).all(), "every rank computed tokens"
