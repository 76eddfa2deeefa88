"""The Ascend plug: LMDeploy's own modules of experts with our operators, on npu tensors and over HCCL.

LMDeploy's Ascend backend and dlinfer are the real ones. Whole engines: test_pipeline.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")

from epbackend.engines.lmdeploy.devices import dlinfer_package

pytestmark = pytest.mark.ascend

COMPUTED = {"float": torch.bfloat16, "w8a8": torch.bfloat16}


@pytest.fixture(autouse=True)
def _dlinfer(npu):
    dlinfer_package.load()


@pytest.fixture(scope="module", autouse=True)
def _ranks_of_their_own(ranks):
    """dlinfer makes torch.cuda a name of the NPU in them: later modules get new ones."""
    yield
    ranks.close()


def equals_reference(groups, settings):
    """`modules.module_equals_reference`, which imports LMDeploy, in a rank."""
    dlinfer_package.load()
    from tests.helpers.moe_modules import Case, module_equals_reference

    return module_equals_reference(groups, Case(device="ascend", **settings))


WAYS = {
    "one rank": ({"size": 1}, "replicated"),
    "shared tokens": ({"size": 2, "level": 1}, "replicated"),
    "own tokens": ({"size": 2, "level": 1, "dp": 2}, "allgather"),
    "replicas": ({"size": 2, "level": 2, "dp": 2, "dispatcher": "alltoall", "replicas": True}, "alltoall"),
    "fused": ({"size": 2, "level": 2, "dp": 2, "hidden": 1024, "replicas": True}, "mc2"),
}
BY_NAME_ALONE = "few ranks of an A2 take mc2 by name alone"
# Dispatchers that both forms' rows travel by alike; `mc2` computes each form by operators of its own.
RARER = {("w8a8", "shared tokens"), ("w8a8", "own tokens")}


@pytest.mark.parametrize(
    ("form", "settings", "dispatcher"),
    [
        pytest.param(form, *WAYS[way], id=f"{way}-{form}", marks=[pytest.mark.slow] * ((form, way) in RARER))
        for way in WAYS
        for form in COMPUTED
    ],
)
def test_lmdeploys_modules_give_what_the_reference_gives(ranks, npu, form, settings, dispatcher):
    if (npu, dispatcher) == ("A2", "mc2"):
        pytest.skip(BY_NAME_ALONE)
    settings = {"form": form, "dtype": COMPUTED[form]} | settings
    seen = ranks.run(settings["size"], equals_reference, settings)
    assert {rank.dispatcher for rank in seen} == {dispatcher}
    assert {count for rank in seen for count in rank.kept} == {1}, "weights are held once, by our layer"
    tokens = 8 if settings.get("dp") else 5
    assert sum(rank.load.tokens_RYE.sum() for rank in seen) == 3 * tokens


def host_waits(groups, settings):
    """What makes the host wait for the device in a layer's second call and behind the step."""
    from epbackend.engines.lmdeploy import state
    from tests.helpers.cann import aten
    from tests.helpers.moe_modules import Case, batch_of, built_for, load_module

    dlinfer_package.load()
    case = Case(device="ascend", dtype=torch.bfloat16, form="float", **settings)
    ranks = groups[case.size // case.dp]
    place = torch.device("npu", ranks.rank)
    with built_for(case, ranks):
        module, _ = load_module(case, place)
        hidden, ids, routed = (each.to(place) for each in batch_of(case, 0))
        for _ in range(2):
            aten.host_waits.clear()
            module(hidden, routed, ids)
            state.active().stats_writer.step()
        return list(aten.host_waits)


@pytest.mark.parametrize(
    "settings",
    [{"size": 2}, {"size": 2, "level": 2, "dp": 2, "hidden": 1024}],
    ids=["replicated", "mc2"],
)
def test_a_decode_step_never_waits_for_the_device(ranks, npu, settings):
    """Neither for a layer's rows nor for the counters of its load."""
    if npu == "npu":
        pytest.skip("the emulated CANN counts waits")
    if npu == "A2" and settings.get("dp"):
        pytest.skip(BY_NAME_ALONE)
    assert ranks.run(2, host_waits, settings) == [[], []]


def test_dlinfer_is_told_that_a_rank_is_alone():
    """Else each step would gather the ranks' tokens, and dlinfer's router split them."""
    from lmdeploy.pytorch.model_inputs import BuildModelContext, StepContextManager, step_ctx_manager

    from epbackend.engines.lmdeploy.devices.ascend import AscendBackend

    int32 = {"dtype": torch.int32, "device": "npu"}
    step = SimpleNamespace(
        kv_caches=[(torch.zeros(4, 16, 1, 8, device="npu"),)],
        block_offsets=torch.tensor([[0], [1]], **int32),
        q_seqlens=torch.ones(2, **int32),
        kv_seqlens=torch.tensor([3, 5], **int32),
        input_ids=torch.zeros(1, 2, **int32),
        is_decoding=True,
        global_is_decoding=lambda: True,
        max_q_seqlen=1,
        max_kv_seqlen=5,
        sum_kv_seqlen=8,
        kv_quant_policy=0,
        model_config=SimpleNamespace(is_gated_delta=False),
    )
    with step_ctx_manager(StepContextManager(BuildModelContext())):
        told = AscendBackend.update_step_context(step).moe_metadata
    assert (told.dp_size, told.tp_size, told.ep_size, told.pad_size) == (1, 1, 1, 0)
    assert told.x_active_mask is None
    assert told.moe_group_name is None


def test_the_router_of_deepseek_v3_is_ours():
    from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec

    from epbackend.engines.lmdeploy.devices.ascend import AscendBackend
    from epbackend.engines.lmdeploy.operators import NpuRouter

    spec = RouterNoauxTCBuildSpec("sigmoid", 8, 8, 4, 256, routed_scaling_factor=2.5)
    assert isinstance(AscendBackend.build_op(spec), NpuRouter)


def test_the_engine_runs_without_captured_graphs():
    from epbackend import EPConfig
    from epbackend.engines.lmdeploy.lmdeploy_config import engine_config

    assert engine_config(EPConfig.load({"device": "ascend", "ep_size": 2})).eager_mode
