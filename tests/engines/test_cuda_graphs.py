"""The CUDA plug where LMDeploy captures graphs, or compiles; see `test_cuda_plug`."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lmdeploy.pytorch.backends import get_backend
from lmdeploy.pytorch.backends.cuda.graph_runner import CUDAGraphRunner
from lmdeploy.pytorch.backends.cuda.graph_runner.piecewise import (
    piecewise_graph_execution,
    trace_piecewise_cuda_graph,
)
from lmdeploy.pytorch.backends.cuda.step_metadata import CudaStepMetaPlan, collect_step_metadata
from lmdeploy.pytorch.config import DLLMConfig
from lmdeploy.pytorch.model_inputs import BuildModelContext
from lmdeploy.pytorch.models.patch import build_model_context

from epbackend import EPConfig
from epbackend.dispatch.base import RankGroup
from epbackend.engines.lmdeploy import plug, state
from epbackend.engines.lmdeploy.devices.cuda import ExpertsBetweenGraphs
from epbackend.engines.lmdeploy.operators import LayerExperts
from epbackend.errors import ConfigError
from tests.helpers.moe_modules import (
    FORMS,
    PLACE,
    Case,
    K,
    answer,
    batch_of,
    built_for,
    cuda_case,
    load_module,
    needs_ray_for_dp,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    ("said", "tokens"),
    [({}, 16), ({"num_spec_tokens": 3}, 64), ({"dllm_config": DLLMConfig(block_length=4)}, 64)],
    ids=["one each", "drafted", "diffused"],
)
def test_decoding_is_bounded_as_lmdeploys_graphs_are(cuda, said, tokens):
    with (
        built_for(cuda_case("float"), RankGroup.single()),
        build_model_context(BuildModelContext(max_batch_size=16, **said)),
    ):
        module, _ = load_module(cuda_case("float"), PLACE)
    assert module.impl.settings["decode"].max_tokens == tokens
    assert module.impl.settings["prefill"].max_tokens is None


def test_between_captured_pieces_the_filling_is_left_out(cuda):
    """Prefill in pieces fills a batch up to a graph's size; experts see the batch alone."""
    settings = cuda_case("float", tokens=(5,))
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


class Filling(CUDAGraphRunner):
    """LMDeploy's runner where a graph would be replayed: its buffers keep their size, whatever the batch has."""

    def __init__(self, module, idle: bool) -> None:
        step = SimpleNamespace(global_is_decoding=lambda: True, is_dummy=idle)
        self.ctx_mgr, self._module = SimpleNamespace(current_context=lambda: step), module

    def _should_use_full_graph(self, *_) -> bool:
        return True

    def _forward_full_graph(self, *, input_ids, batch, **_) -> torch.Tensor:
        return self._module(*batch)[: input_ids.numel()]


def replayed(groups, settings: Case, real: tuple[int, ...], warm_up: bool = False) -> int:
    """Tokens that this rank counts when so many rows of each rank's batch are of requests; none: it is idle."""
    ranks = groups[1]
    mine = real[ranks.rank]
    with built_for(settings, ranks):
        module, weights = load_module(settings, PLACE)
        hidden, ids, routed = batch_of(settings, ranks.rank)
        with state.active().real_tokens.warm_up() if warm_up else nullcontext():
            found = Filling(module, not mine)(
                input_ids=torch.zeros(1, mine or 1),
                attn_metadata=SimpleNamespace(block_offsets=torch.zeros(1, dtype=torch.int32)),
                batch=(hidden.to(PLACE), routed.to(PLACE), ids.to(PLACE)),
            )
        state.active().stats_writer.step()
        state.active().stats_writer.close()
        counted = int(state.active().load_report().tokens_RYE.sum())
    if mine:
        expected = answer(weights, hidden[:mine], ids[:mine], routed[:mine])
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    return counted


@pytest.mark.parametrize(("level", "dispatcher"), [(1, "allgather"), (2, "alltoall")])
def test_what_fills_a_graph_up_is_neither_computed_nor_counted(cuda, ranks, level, dispatcher):
    """Of two engines (dp 2) one is short of the graph's size, and the other one has no request."""
    needs_ray_for_dp()
    settings = cuda_case(
        "float", size=2, dp=2, level=level, dispatcher=dispatcher, tokens=(5, 5), graphs=True, replicas=True
    )
    assert sum(ranks.run(2, replayed, settings, (3, 0))) == 3 * K


def test_a_warm_up_computes_what_it_makes_up(cuda, ranks):
    needs_ray_for_dp()
    settings = cuda_case("float", size=2, dp=2, tokens=(5, 5), graphs=True)
    assert sum(ranks.run(2, replayed, settings, (3, 0), True)) == (3 + 1) * K


@pytest.fixture
def gpu(cuda):
    if cuda.emulated:
        pytest.skip("capturing a CUDA graph needs a GPU")


def on_device(settings: Case) -> list[torch.Tensor]:
    hidden, ids, routed = (each.to(PLACE) for each in batch_of(settings, 0))
    return [hidden, routed, ids]


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_layer_replays_and_counts_its_load(gpu, form):
    """What decoding does; the load counts what replays do."""
    settings = cuda_case(form, graphs=True)
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
            state.active().stats_writer.step()
        state.active().stats_writer.close()
        load = state.active().load_report()
    torch.testing.assert_close(found, expected)
    assert load.calls == 3
    assert load.tokens_RYE.sum() == (1 + 3) * inputs[2].numel()


def test_a_layer_captured_in_pieces_replays(gpu):
    """What LMDeploy does with prefill where `piecewise_cudagraph_max_tokens` is set."""
    settings = cuda_case("float")
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


def test_experts_between_captured_pieces_are_registered(cuda):
    """Experts it does not know of would be captured with what surrounds them."""
    with built_for(cuda_case("w8a8"), RankGroup.single()):
        context = SimpleNamespace()
        with (
            mock.patch.object(CudaStepMetaPlan, "from_implementations") as resolve,
            collect_step_metadata(context),
        ):
            load_module(cuda_case("w8a8"), PLACE)
    _, boundaries = resolve.call_args.args
    assert [type(each) for each in boundaries] == [ExpertsBetweenGraphs]


def test_dp_decoding_of_a_model_without_graphs_is_refused(cuda):
    """Its ranks' batches are not filled up alike, on which captured decoding relies."""
    needs_ray_for_dp()
    with (
        built_for(cuda_case("float", size=2, dp=2, graphs=True), RankGroup.single()),
        pytest.raises(ConfigError, match=r"no graphs of Linear.*set engine\.eager_mode: true"),
    ):
        get_backend().build_graph_runner(torch.nn.Linear(1, 1), None, None, None, None)


def test_torch_compile_does_not_trace_our_layer(cuda):
    from lmdeploy.pytorch.backends.cuda.graph_runner import full_graph
    from torch._dynamo import trace_rules

    assert not trace_rules.check(LayerExperts.forward)
    plug.enable(EPConfig.load({"device": "cuda"}))
    full_graph._configure_decode_torch_compile()
    assert trace_rules.check(LayerExperts.forward), "it is not traced"
