"""LMDeploy pipelines with the tiny models that come along, on one rank and on two that share a device.

On a machine with GPUs: `make e2e-cuda`. One GPU is enough: ranks are then joined by `peer_group`, with two GPUs by
NCCL. What is compared are the log-probabilities that the engine tells of the tokens it chose: on a GPU with those of
LMDeploy without the plug in the same dtype, on a CPU, where LMDeploy does not run by itself, with Hugging Face's.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "lmdeploy", reason="LMDeploy is not installed; make gather-gpu brings it to a GPU machine"
)

import lmdeploy

import epbackend
from epbackend import EPConfig
from epbackend.balance import balancer
from epbackend.device.cuda import CudaDevice
from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
from tests.helpers.answers import Answer, Rounding, ask, compare, hugging_face
from tests.helpers.patience import PATIENCE_S
from tests.helpers.rotating_planner import RotatingPlanner
from tests.helpers.shared_gpu import on_shared_devices

MODELS = Path(epbackend.__file__).parent / "models"
ENGINE = {
    "session_len": 256,
    "cache_blocks": 64,
    "max_batch_size": 8,  # few graphs to capture
    "log_level": "ERROR",
    "extra": {"logprobs_mode": "raw_logprobs"},
}
DTYPES = {"tiny_qwen3_moe": "bfloat16", "tiny_deepseek_v3": "float16"}
"""On a GPU. LMDeploy's own attention leaves DeepSeek-V3 in bfloat16 off by 0.19 on the longest text, against float32
(H200, without the plug), and ranks that share its heads are off in another way: nothing could be told from that."""
EXACT, ROUNDING = Rounding(1e-4), Rounding(0.15)
"""Of a log-probability: in float32, and in these. 0.04 was seen on a CPU, in bfloat16 against float32."""


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
def lmdeploy_alone(model: str, eager: bool) -> list[Answer]:
    """On the same GPU, in the same dtype."""
    config = EPConfig.load(
        {"device": "cuda", "engine": ENGINE | {"dtype": DTYPES[model], "eager_mode": eager}}
    )
    with lmdeploy.pipeline(
        str(MODELS / model), backend_config=engine_config(config), log_level="ERROR"
    ) as pipe:
        return ask(pipe)


def check(model: str, expected: list[Answer], rounding: Rounding, config: dict[str, Any]) -> dict[str, str]:
    """Fail unless the answers are those expected (`answers.compare`). Returns each phase's dispatcher."""
    with epbackend.pipeline(str(MODELS / model), EPConfig.load(config)) as pipe:
        found = ask(pipe)
        load = pipe.load()
    compare(found, expected, rounding)
    assert load.tokens_RYE.any(axis=(1, 2)).all(), "every rank computed tokens"
    return {phase: choice["name"] for phase, choice in load.dispatchers.items()}


BALANCE = {"on": True, "redundant_experts": 4, "window_steps": 8, "interval_s": 0.2}


@pytest.fixture
def rotating(monkeypatch):
    """All experts of all layers move, again and again."""
    monkeypatch.setattr(balancer, "Planner", RotatingPlanner)


def check_moving(model: str, expected: list[Answer], rounding: Rounding, config: dict[str, Any]) -> None:
    """The same again and again while experts move."""
    deadline = time.monotonic() + PATIENCE_S
    with epbackend.pipeline(str(MODELS / model), EPConfig.load(config | {"balance": BALANCE})) as pipe:
        while pipe.balance().migrations < 8:
            assert time.monotonic() < deadline, pipe.balance()
            compare(ask(pipe), expected, rounding)
        assert pipe.balance().failed == 0, pipe.balance()


@pytest.mark.cpu
@pytest.mark.engine
def test_two_ranks_of_a_cpu_joined_as_on_one_gpu(monkeypatch):
    """The harness of the tests below, where it can run everywhere."""
    on_shared_devices(monkeypatch)
    levels = {"prefill": 2, "decode": 1}
    settings = {"device": "cpu", "ep_size": 2, "ep_level": levels, "engine": ENGINE | {"dtype": "float32"}}
    chosen = check("tiny_qwen3_moe", hugging_face(str(MODELS / "tiny_qwen3_moe")), EXACT, settings)
    assert chosen == {"prefill": "alltoall", "decode": "replicated"}


@pytest.mark.cpu
@pytest.mark.engine
@pytest.mark.slow
def test_experts_move_between_ranks_joined_as_on_one_gpu(rotating, monkeypatch):
    on_shared_devices(monkeypatch)
    settings = {"device": "cpu", "ep_size": 2, "ep_level": 2, "engine": ENGINE | {"dtype": "float32"}}
    check_moving("tiny_qwen3_moe", hugging_face(str(MODELS / "tiny_qwen3_moe")), EXACT, settings)


@pytest.mark.cuda
@pytest.mark.engine
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize(
    ("model", "level", "dispatcher", "split"),
    [
        ("tiny_qwen3_moe", 1, "replicated", "even"),
        ("tiny_qwen3_moe", 2, "symmetric", "level"),
        ("tiny_deepseek_v3", 2, "alltoall", "nearest"),
    ],
)
def test_experts_move_on_gpus(gpu, rotating, model, level, dispatcher, split, eager):
    """While captured graphs are replayed."""
    engine = ENGINE | {"dtype": DTYPES[model], "eager_mode": eager}
    settings = {"device": "cuda", "ep_size": 2, "ep_level": level, "dispatcher": dispatcher}
    settings |= {"placement": {"split": split}, "engine": engine}
    check_moving(model, lmdeploy_alone(model, eager), ROUNDING, settings)


@pytest.mark.cuda
@pytest.mark.engine
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("model", ["tiny_qwen3_moe", "tiny_deepseek_v3"])
@pytest.mark.parametrize(
    ("ep", "level", "dispatcher"),
    [(1, 1, "replicated"), (2, 1, "replicated"), (2, 2, "symmetric"), (2, 2, "alltoall")],
)
def test_on_gpus(gpu, ep, level, dispatcher, model, eager):
    engine = ENGINE | {"dtype": DTYPES[model], "eager_mode": eager}
    settings = {"device": "cuda", "ep_size": ep, "ep_level": level, "engine": engine}
    if ep > 1:
        settings["dispatcher"] = dispatcher
    chosen = check(model, lmdeploy_alone(model, eager), ROUNDING, settings)
    assert set(chosen.values()) == {dispatcher}
