"""The CUDA plug: LMDeploy's own modules with our operators, in Triton's interpreter (TRITON_INTERPRET=1) or on GPUs."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lmdeploy import GenerationConfig
from lmdeploy.pytorch.backends import get_backend
from lmdeploy.pytorch.backends.deepep_state import get_deepep_state
from lmdeploy.pytorch.backends.moe import (
    FusedMoEBlockedF8BuildSpec,
    FusedMoEStaticF8BuildSpec,
    FusedMoEV4FP4BuildSpec,
    FusedMoEW4A16BuildSpec,
    FusedMoEW8A8BuildSpec,
)
from lmdeploy.pytorch.check_env.dist import DistChecker

import epbackend
from epbackend import EPConfig
from epbackend.balance import balancer
from epbackend.dispatch.base import RankGroup
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.operators import expert_operator
from epbackend.errors import ConfigError, UnavailableError
from epbackend.placement.placement import Placement
from tests.helpers.engine_models import greedy_tokens, prompts
from tests.helpers.interpreted import with_cuda_experts
from tests.helpers.moe_modules import (
    COPIES,
    FORMS,
    PLACE,
    Case,
    E,
    Seen,
    built_for,
    cuda_case,
    load_module,
    module_equals_reference,
    needs_ray_for_dp,
)
from tests.helpers.patience import PATIENCE_S
from tests.helpers.rotating_planner import RotatingPlanner

pytestmark = pytest.mark.cuda
ONE = {1: RankGroup.single()}
FEW_TOKENS = 4
FEW = GenerationConfig(max_new_tokens=FEW_TOKENS, do_sample=False, ignore_eos=True)


@pytest.fixture
def run(cuda, ranks):
    """Runs a case on its ranks: in the interpreter on gloo, on real GPUs where there is one for each rank."""

    def run(case: Case) -> list[Seen]:
        if not cuda.emulated and torch.cuda.device_count() < case.size:
            pytest.skip(f"{case.size} ranks joined by NCCL need {case.size} GPUs")
        if case.dp > 1:
            needs_ray_for_dp()
        return ranks.run(case.size, module_equals_reference, case)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_modules_on_one_rank_give_what_the_reference_gives(cuda, form):
    seen = module_equals_reference(ONE, cuda_case(form))
    assert seen.expert_list is None
    assert set(seen.kept) == {1}, "weights are held once, by our layer"
    assert not get_deepep_state().enabled(), "nothing in LMDeploy takes DeepEP's way"


WAYS = {
    "shared tokens": ({"level": 1}, "replicated"),
    "own tokens": ({"level": 1, "dp": 2}, "allgather"),
    "replicas": ({"level": 2, "dp": 2, "replicas": True}, "alltoall"),
}
# Which form experts have and how their rows travel are apart: each form in one way, each way with one form.
RARER = {(form, way) for form in FORMS for way in WAYS if form != "float" and way != "replicas"}


@pytest.mark.parametrize(
    ("form", "settings", "dispatcher"),
    [
        pytest.param(form, *WAYS[way], id=f"{way}-{form}", marks=[pytest.mark.slow] * ((form, way) in RARER))
        for way in WAYS
        for form in FORMS
    ],
)
def test_modules_on_two_ranks_give_what_the_reference_gives(run, form, settings, dispatcher):
    seen = run(cuda_case(form, size=2, **settings))
    assert [rank.dispatcher for rank in seen] == [dispatcher] * 2
    if settings.get("replicas"):
        assert [rank.expert_list for rank in seen] == [list(held) for held in COPIES.experts_of_rank]
    computed = sum(rank.load.tokens_RYE.sum() for rank in seen)
    assert computed == 3 * (8 if settings.get("dp") else 5)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_each_expert_on_two_ranks_give_what_the_reference_gives(run, form):
    """Tensor parallelism. The width is one block of FP8, of which the second rank gets nothing."""
    seen = run(cuda_case(form, size=2, spread=False))
    assert [rank.dispatcher for rank in seen] == ["replicated", None if form == "fp8" else "replicated"]


@pytest.mark.parametrize("level", [1, 2])
def test_static_calls_on_two_ranks_give_what_the_reference_gives(run, level):
    """Ranks bring equally many tokens, and nothing is read back to size anything."""
    run(cuda_case("float", size=2, dp=2, level=level, replicas=True, tokens=(4, 4), graphs=True))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"fp8_dtype": torch.float8_e5m2}, "float8_e5m2.*blocks of 128: use"),
        ({"block_size": 64}, "blocks of 64"),
    ],
)
def test_other_float8_forms_are_refused(cuda, changed, match):
    with built_for(cuda_case("fp8"), RankGroup.single()):
        module, _ = load_module(cuda_case("fp8"), PLACE)
        spec: FusedMoEBlockedF8BuildSpec = replace(module.impl.spec, **changed)
        with pytest.raises(ConfigError, match=match):
            get_backend().build_op(spec)


def test_w8a8_with_float8_values_is_refused(cuda):
    with (
        built_for(cuda_case("w8a8"), RankGroup.single()),
        pytest.raises(ConfigError, match=r"W8A8 experts are torch\.float8_e4m3fn.*use a checkpoint"),
    ):
        get_backend().build_op(
            FusedMoEW8A8BuildSpec(2, E, False, torch.bfloat16, torch.float8_e4m3fn, 1, None)
        )


OTHERS = [
    FusedMoEStaticF8BuildSpec(2, E, False, torch.bfloat16, torch.float8_e4m3fn),
    FusedMoEW4A16BuildSpec(2, E, False, 4, 32, 64, 2, None, torch.bfloat16, 8, 0),
    FusedMoEV4FP4BuildSpec(2, E, 64, 64, 0, 1.0, None, 2, None, 8),
]


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: type(spec).__name__)
def test_other_quantized_forms_are_refused_on_two_ranks(cuda, spec):
    plug.enable(EPConfig.load({"device": "cuda", "ep_size": 2}))
    with pytest.raises(ConfigError, match=r"ep_size: 2, but this model's experts are .*use ep_size: 1"):
        expert_operator(spec, "cuda")
    plug.disable()
    plug.enable(EPConfig.load({"device": "cuda"}))
    assert expert_operator(spec, "cuda") is None, "LMDeploy's own operator serves one rank"


def test_w8a8_experts_without_a_layer_number_are_refused(cuda):
    """As layer 0 they would all get one layer's places."""
    plug.enable(EPConfig.load({"device": "cuda"}))
    with pytest.raises(UnavailableError, match="do not tell which layer"):
        expert_operator(FusedMoEW8A8BuildSpec(2, E, False, torch.bfloat16, torch.int8, 1, None), "cuda")


def test_the_log_says_that_no_run_on_a_gpu_in_which_experts_move_has_been_compared(cuda, caplog):
    config = EPConfig.load({"device": "cuda", "ep_size": 2, "balance": {"on": True, "redundant_experts": 2}})
    plug.enable(config, Placement.even(2, E, 2, E + 2))
    assert "balance.on: moving experts on device cuda" in caplog.text


def check(dp: int = 1, ep: int = 2, executor: str = "mp", device: str = "cuda") -> None:
    DistChecker(1, dp, ep, executor, device).check()


def test_lmdeploys_check_of_ranks_does_not_demand_deep_ep(cuda):
    with pytest.raises(SystemExit):
        check()
    plug.enable(EPConfig.load({"device": "cuda", "ep_size": 2}))
    check()
    with pytest.raises(ConfigError, match="uni"):
        check(executor="uni")
    with pytest.raises(ConfigError, match="dp>1 requires"):
        check(dp=2)
    with pytest.raises(ConfigError, match="Unsupported distributed_executor_backend"):
        check(executor="threads")


@pytest.mark.usefixtures("forked_ranks")
def test_greedy_tokens_of_a_pipeline_with_cuda_experts_that_move(cuda, checkpoint, monkeypatch):
    """Two ranks, both levels. Attention and the rest are the CPU's, the experts are the CUDA kernels'."""
    if not cuda.emulated:
        pytest.skip("experts on a GPU want the whole engine there: make e2e-cuda")
    with_cuda_experts(monkeypatch)
    texts = prompts()[:2]
    engine = {"session_len": 32, "cache_blocks": 32, "block_size": 16, "max_prefill_token_num": 16}
    levels = {"prefill": 2, "decode": 1}
    balance = {"on": True, "redundant_experts": 4, "window_steps": 4, "interval_s": 0.1}
    settings = {"device": "cpu", "ep_size": 2, "ep_level": levels, "engine": engine, "balance": balance}
    monkeypatch.setattr(balancer, "Planner", RotatingPlanner)
    expected = greedy_tokens(checkpoint("qwen3-moe"), texts, FEW_TOKENS)
    deadline = time.monotonic() + PATIENCE_S
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), EPConfig.load(settings)) as pipe:
        before, moved = pipe.load(), 0
        while moved < 2:
            assert time.monotonic() < deadline, pipe.balance()
            moved = pipe.balance().migrations
            answers = pipe(texts, gen_config=FEW, do_preprocess=False)
            assert [answer.token_ids for answer in answers] == expected
        load = pipe.load().since(before)
        assert pipe.balance().failed == 0, pipe.balance()
    assert load.tokens_RYE.any(axis=2).all(), "every rank computed experts of every layer"
