"""The CUDA plug: LMDeploy's own modules with our operators, in Triton's interpreter or on GPUs.

`test_in_the_interpreter` runs these tests where there is no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lmdeploy import GenerationConfig
from lmdeploy.pytorch.backends.cuda.graph_runner.piecewise import (
    piecewise_graph_execution,
    trace_piecewise_cuda_graph,
)
from lmdeploy.pytorch.backends.cuda.step_metadata import CudaStepMetaPlan, collect_step_metadata
from lmdeploy.pytorch.backends.deepep_state import get_deepep_state
from lmdeploy.pytorch.backends.moe import (
    FusedMoEBlockedF8BuildSpec,
    FusedMoEStaticF8BuildSpec,
    FusedMoEV4FP4BuildSpec,
    FusedMoEW4A16BuildSpec,
    FusedMoEW8A8BuildSpec,
)
from lmdeploy.pytorch.check_env.dist import DistChecker
from lmdeploy.pytorch.config import DLLMConfig
from lmdeploy.pytorch.model_inputs import BuildModelContext
from lmdeploy.pytorch.models.patch import build_model_context

import epbackend
from epbackend import EPConfig
from epbackend.device.cuda import CudaDevice
from epbackend.dispatch.ranks import RankGroup
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.graphs import ExpertsBetweenGraphs
from epbackend.engines.lmdeploy.moe import LayerExperts
from epbackend.engines.lmdeploy.operators import expert_operator
from epbackend.errors import ConfigError, UnavailableError
from tests.engines.interpreted import with_cuda_experts
from tests.engines.models import greedy_tokens, prompts
from tests.engines.modules import (
    COPIES,
    Case,
    E,
    Seen,
    batch_of,
    built_for,
    load_module,
    module_equals_reference,
)

pytestmark = pytest.mark.cuda
FORMS = ("float", "fp8", "w8a8")
ONE = {1: RankGroup.single()}
PLACE = CudaDevice().torch_device(0)
FEW_TOKENS = 4
FEW = GenerationConfig(max_new_tokens=FEW_TOKENS, do_sample=False, ignore_eos=True)


def case(form: str, **settings) -> Case:
    dtype = torch.float32 if form == "float" else torch.bfloat16
    return Case(form, "cuda", dtype=dtype, **settings)


@pytest.fixture(scope="module")
def cuda() -> CudaDevice:
    device = CudaDevice()
    if reason := device.unavailable():
        pytest.skip(f"cuda: {reason}")
    return device


@pytest.fixture
def run(cuda, ranks):
    """Runs a case on its ranks: in the interpreter on gloo, on real GPUs where there is one for each rank."""

    def run(case: Case) -> list[Seen]:
        if not cuda.emulated and torch.cuda.device_count() < case.size:
            pytest.skip(f"{case.size} ranks joined by NCCL need {case.size} GPUs")
        return ranks.run(case.size, module_equals_reference, case)

    return run


@pytest.mark.parametrize("form", FORMS)
def test_one_rank(cuda, form):
    seen = module_equals_reference(ONE, case(form))
    assert seen.expert_list is None
    assert set(seen.kept) == {1}, "weights are held once, by our layer"
    assert not get_deepep_state().enabled(), "nothing in LMDeploy takes DeepEP's way"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("settings", "dispatcher"),
    [
        ({"level": 1}, "replicated"),
        ({"level": 1, "dp": 2}, "allgather"),
        ({"level": 2, "dp": 2, "copies": True}, "alltoall"),
    ],
    ids=["shared tokens", "own tokens", "copies"],
)
def test_two_ranks(run, form, settings, dispatcher):
    seen = run(case(form, size=2, **settings))
    assert [rank.dispatcher for rank in seen] == [dispatcher] * 2
    if settings.get("copies"):
        assert [rank.expert_list for rank in seen] == [list(held) for held in COPIES.experts_of_rank]
    computed = sum(rank.load.tokens_RLE.sum() for rank in seen)
    assert computed == 3 * (8 if settings.get("dp") else 5)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_with_a_part_of_each_expert(run, form):
    """Tensor parallelism. The width is one block of FP8, of which the second rank gets nothing."""
    seen = run(case(form, size=2, spread=False))
    assert [rank.dispatcher for rank in seen] == ["replicated", None if form == "fp8" else "replicated"]


@pytest.mark.parametrize("level", [1, 2])
def test_two_ranks_as_decoding_is_captured(run, level):
    """Ranks bring equally many tokens, and nothing is read back to size anything."""
    run(case("float", size=2, dp=2, level=level, copies=True, tokens=(4, 4), graphs=True))


@pytest.mark.parametrize(
    ("said", "tokens"),
    [({}, 16), ({"num_spec_tokens": 3}, 64), ({"dllm_config": DLLMConfig(block_length=4)}, 64)],
    ids=["one each", "drafted", "diffused"],
)
def test_decoding_is_bounded_as_lmdeploys_graphs_are(cuda, said, tokens):
    with (
        built_for(case("float"), RankGroup.single()),
        build_model_context(BuildModelContext(max_batch_size=16, **said)),
    ):
        module, _ = load_module(case("float"), PLACE)
    assert module.impl.settings["decode"].max_tokens == tokens
    assert module.impl.settings["prefill"].max_tokens is None


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"fp8_dtype": torch.float8_e5m2}, "float8_e5m2.*blocks of 128: use"),
        ({"block_size": 64}, "blocks of 64"),
    ],
)
def test_fp8_that_is_not_computed(cuda, changed, match):
    with built_for(case("fp8"), RankGroup.single()):
        module, _ = load_module(case("fp8"), PLACE)
        spec: FusedMoEBlockedF8BuildSpec = replace(module.impl.spec, **changed)
        with pytest.raises(ConfigError, match=match):
            _backend().build_op(spec)


def test_w8a8_of_floats_is_refused(cuda):
    with (
        built_for(case("w8a8"), RankGroup.single()),
        pytest.raises(ConfigError, match=r"W8A8 experts are torch\.float8_e4m3fn.*use a checkpoint"),
    ):
        _backend().build_op(FusedMoEW8A8BuildSpec(2, E, False, torch.bfloat16, torch.float8_e4m3fn, 1, None))


def _backend():
    from lmdeploy.pytorch.backends import get_backend

    return get_backend()


OTHERS = [
    FusedMoEStaticF8BuildSpec(2, E, False, torch.bfloat16, torch.float8_e4m3fn),
    FusedMoEW4A16BuildSpec(2, E, False, 4, 32, 64, 2, None, torch.bfloat16, 8, 0),
    FusedMoEV4FP4BuildSpec(2, E, 64, 64, 0, 1.0, None, 2, None, 8),
]


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: type(spec).__name__)
def test_forms_that_are_not_spread(cuda, spec):
    plug.enable(EPConfig.load({"device": "cuda", "ep_size": 2}))
    with pytest.raises(ConfigError, match=r"ep_size: 2, but this model's experts are .*use ep_size: 1"):
        expert_operator(spec, "cuda")
    plug.disable()
    plug.enable(EPConfig.load({"device": "cuda"}))
    assert expert_operator(spec, "cuda") is None, "LMDeploy's own operator serves one rank"


def test_w8a8_experts_of_a_layer_that_nobody_tells(cuda):
    """As layer 0 they would all get one layer's places."""
    plug.enable(EPConfig.load({"device": "cuda"}))
    with pytest.raises(UnavailableError, match="do not tell which layer"):
        expert_operator(FusedMoEW8A8BuildSpec(2, E, False, torch.bfloat16, torch.int8, 1, None), "cuda")


def check(dp: int = 1, ep: int = 2, executor: str = "mp", device: str = "cuda") -> None:
    DistChecker(1, dp, ep, executor, device).check()


def test_deep_ep_is_not_demanded(cuda):
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


def test_greedy_tokens_of_a_pipeline(cuda, checkpoint, monkeypatch):
    """Two ranks, both levels. Attention and the rest are the CPU's, the experts are the CUDA kernels'."""
    if not cuda.emulated:
        pytest.skip("experts on a GPU want the whole engine there: make e2e-cuda")
    with_cuda_experts(monkeypatch)
    texts = prompts()[:2]
    engine = {"session_len": 32, "cache_blocks": 32, "block_size": 16, "max_prefill_token_num": 16}
    levels = {"prefill": 2, "decode": 1}
    config = EPConfig.load({"device": "cpu", "ep_size": 2, "ep_level": levels, "engine": engine})
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), config) as pipe:
        before = pipe.load()
        answers = pipe(texts, gen_config=FEW, do_preprocess=False)
        load = pipe.load().since(before)
    assert [answer.token_ids for answer in answers] == greedy_tokens(
        checkpoint("qwen3-moe"), texts, FEW_TOKENS
    )
    assert load.tokens_RLE.any(axis=2).all(), "every rank computed experts of every layer"


def test_between_captured_pieces_the_filling_is_left_out(cuda):
    """Prefill in pieces fills a batch up to a graph's size; experts see the batch alone."""
    settings = case("float", tokens=(5,))
    with built_for(settings, RankGroup.single()):
        module, _ = load_module(settings, PLACE)
        hidden, routed, ids = on_device(settings)
        expected = module(hidden[:3], routed[:3], ids[:3])
        boundary = ExpertsBetweenGraphs(module.impl)
        assert boundary.supports_piecewise_cuda_graph()
        boundary.enable_piecewise_cuda_graph()
        with piecewise_graph_execution(raw_tokens=3, token_bucket=5):
            torch.testing.assert_close(module(hidden, routed, ids), expected)
        assert len(module(hidden, routed, ids)) == 5


@pytest.fixture
def gpu(cuda):
    if cuda.emulated:
        pytest.skip("capturing a CUDA graph needs a GPU")


def on_device(settings: Case) -> list[torch.Tensor]:
    hidden, ids, routed = (each.to(PLACE) for each in batch_of(settings, 0))
    return [hidden, routed, ids]


@pytest.mark.parametrize("form", FORMS)
def test_captured_whole_and_replayed(gpu, form):
    """What decoding does; the load counts what replays do."""
    settings = case(form, graphs=True)
    with built_for(settings, RankGroup.single()):
        module, _ = load_module(settings, PLACE)
        inputs = on_device(settings)
        expected = module(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = module(*inputs)
        for _ in range(3):
            found.fill_(torch.nan)
            graph.replay()
            plug.active().load_writer.step()
        plug.active().load_writer.close()
        load = plug.active().load_report()
    torch.testing.assert_close(found, expected)
    assert load.calls == 3
    assert load.tokens_RLE.sum() == (1 + 3) * inputs[2].numel()


def test_captured_in_pieces_and_replayed(gpu):
    """What LMDeploy does with prefill where `piecewise_cudagraph_max_tokens` is set."""
    settings = case("float")
    with built_for(settings, RankGroup.single()):
        module, _ = load_module(settings, PLACE)
        ExpertsBetweenGraphs(module.impl).enable_piecewise_cuda_graph()
        hidden, routed, ids = on_device(settings)
        with piecewise_graph_execution(raw_tokens=len(hidden), token_bucket=len(hidden)):
            plan = trace_piecewise_cuda_graph(
                lambda hidden: module(hidden * 2, routed, ids) + 1, [hidden], warmup_iterations=1
            )
            found = plan.replay(-hidden).clone()
        expected = module(hidden * -2, routed, ids) + 1
    assert [type(step).__name__ for step in plan.steps] == ["GraphStep", "EagerStep", "GraphStep"]
    torch.testing.assert_close(found, expected)


def test_lmdeploy_knows_of_the_boundaries(cuda):
    """Experts it does not know of would be captured with what surrounds them."""
    with built_for(case("w8a8"), RankGroup.single()):
        context = SimpleNamespace()
        with (
            mock.patch.object(CudaStepMetaPlan, "from_implementations") as resolve,
            collect_step_metadata(context),
        ):
            load_module(case("w8a8"), PLACE)
    _, boundaries = resolve.call_args.args
    assert [type(each) for each in boundaries] == [ExpertsBetweenGraphs]


def test_a_model_that_cannot_be_captured_beside_others(cuda):
    """Its ranks' batches are not filled up alike, on which captured decoding relies."""
    with (
        built_for(case("float", size=2, dp=2, graphs=True), RankGroup.single()),
        pytest.raises(ConfigError, match=r"no graphs of Linear.*set engine\.eager_mode: true"),
    ):
        _backend().build_graph_runner(torch.nn.Linear(1, 1), None, None, None, None)


def test_a_compiled_decoder_leaves_our_layer_alone(cuda):
    from lmdeploy.pytorch.backends.cuda.graph_runner import full_graph
    from torch._dynamo import trace_rules

    assert not trace_rules.check(LayerExperts.forward)
    plug.enable(EPConfig.load({"device": "cuda"}))
    full_graph._configure_decode_torch_compile()
    assert trace_rules.check(LayerExperts.forward), "it is not traced"
