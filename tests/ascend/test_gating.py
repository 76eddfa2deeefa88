"""The router's operator chooses as LMDeploy's own router does."""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels.npu import ops

FACTOR = 2.5


@pytest.mark.ascend
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("groups", "top_groups"), [(8, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_router_chooses_as_lmdeploys(npu, tokens, groups, top_groups, dtype):
    pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")
    from lmdeploy.pytorch.backends.default.moe_router import DefaultRouterNoauxTCImpl
    from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec

    from epbackend.engines.lmdeploy.operators import NpuRouter

    spec = RouterNoauxTCBuildSpec("sigmoid", 8, groups, top_groups, 256, FACTOR)
    assert NpuRouter.fits(spec)
    logits_TE, bias_E = torch.randn(tokens, 256).to(dtype), torch.rand(256)
    weights_TK, ids_TK = NpuRouter(spec).forward(logits_TE.npu(), bias_E.npu())
    theirs = DefaultRouterNoauxTCImpl("sigmoid", 8, groups, top_groups, 256, FACTOR)
    expected_TK, expected_ids_TK = theirs.forward(logits_TE.float(), bias_E)
    assert weights_TK.dtype == torch.float32
    found_TE, expected_TE = torch.zeros(2, tokens, 256)
    found_TE.scatter_(1, ids_TK.cpu().long(), weights_TK.cpu())
    torch.testing.assert_close(found_TE, expected_TE.scatter_(1, expected_ids_TK, expected_TK))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"scoring_func": "softmax"}, False),
        ({"renormalize": False}, False),
        ({"router_n_groups": 8}, False),
        ({"n_routed_experts": 4096}, False),
    ],
)
def test_only_deepseek_v3s_router_is_replaced(changes, fits):
    pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")
    from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec

    from epbackend.engines.lmdeploy.operators import NpuRouter

    router = {
        "scoring_func": "sigmoid",
        "top_k": 8,
        "n_group": 8,
        "top_k_group": 4,
        "n_routed_experts": 256,
        "routed_scaling_factor": FACTOR,
    }
    assert NpuRouter.fits(RouterNoauxTCBuildSpec(**router | changes)) == fits


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ((256, 8, 8, 4), True),
        ((384, 8, 1, 1), True),
        ((160, 8, 160, 8), False),
        ((384, 8, 7, 1), False),
        ((256, 40, 8, 1), False),
        ((2049, 8, 1, 1), False),
    ],
)
def test_sizes_that_the_fused_router_takes(sizes, fits):
    assert ops.router_fits(*sizes) == fits


@pytest.mark.ascend
def test_fused_router_of_no_token(npu):
    weights_TK, ids_TK = ops.sigmoid_top_k(torch.empty(0, 256).npu(), torch.rand(256).npu(), 8, 8, 4, FACTOR)
    assert (weights_TK.shape, ids_TK.shape) == ((0, 8), (0, 8))


@pytest.mark.ascend
def test_fused_router_of_the_largest_size_runs(npu):
    experts, top_k, groups, top_groups = 2048, 33, 64, 2
    assert ops.router_fits(experts, top_k, groups, top_groups)
    logits_TE, bias_E = torch.randn(2, experts).npu(), torch.rand(experts).npu()
    _, ids_TK = ops.sigmoid_top_k(logits_TE, bias_E, top_k, groups, top_groups, 1.0)
    assert ids_TK.shape == (2, top_k)
