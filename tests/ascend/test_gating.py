"""The router's operators choose as LMDeploy's routers do."""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels.npu import gating

pytestmark = pytest.mark.ascend


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_softmax(npu, tokens, dtype):
    logits_TE = torch.randn(tokens, 64).to(dtype)
    weights_TK, ids_TK = gating.softmax_top_k(logits_TE.npu(), 8)
    expected = logits_TE.float().softmax(1).topk(8)
    assert weights_TK.dtype == torch.float32
    torch.testing.assert_close(weights_TK.cpu(), expected.values)
    chosen_TK = logits_TE.float().softmax(1).gather(1, ids_TK.cpu().long())
    torch.testing.assert_close(chosen_TK, expected.values)


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize(("groups", "top_groups"), [(8, 4), (1, 1)])
def test_sigmoid(npu, tokens, groups, top_groups):
    """The formula of DeepSeek-V3's report, section 2.1.2, token by token."""
    logits_TE, bias_E, top_k, factor = torch.randn(tokens, 256), torch.rand(256), 8, 2.5
    weights_TK, ids_TK = gating.sigmoid_top_k(
        logits_TE.npu(), bias_E.npu(), top_k, groups, top_groups, factor
    )
    scores_TE = logits_TE.sigmoid()
    for scores_E, weights_K, ids_K in zip(scores_TE, weights_TK.cpu(), ids_TK.cpu().long(), strict=True):
        by_group = (scores_E + bias_E).view(groups, -1)
        best = by_group.sort(descending=True).values[:, :2].sum(1).argsort(descending=True)[:top_groups]
        allowed = [int(group) * (256 // groups) + place for group in best for place in range(256 // groups)]
        expected = sorted(allowed, key=lambda expert: -float((scores_E + bias_E)[expert]))[:top_k]
        assert sorted(ids_K.tolist()) == sorted(expected)
        torch.testing.assert_close(weights_K, scores_E[ids_K] / scores_E[ids_K].sum() * factor)


@pytest.mark.parametrize(
    ("router", "fits"),
    [
        ((256, 8, 8, 4), True),
        ((256, 8, 1, 1), True),
        ((160, 8, 160, 8), False),
        ((384, 8, 7, 1), False),
        ((256, 40, 8, 1), False),
        ((2049, 8, 1, 1), False),
    ],
)
def test_sizes(router, fits):
    assert gating.fits_sigmoid(*router) == fits


def test_a_size_that_fits_is_a_size_that_runs(npu):
    experts, top_k, groups, top_groups = 2048, 33, 64, 2
    assert gating.fits_sigmoid(experts, top_k, groups, top_groups)
    _, ids_TK = gating.sigmoid_top_k(
        torch.randn(2, experts).npu(), torch.rand(experts).npu(), top_k, groups, top_groups, 1.0
    )
    assert ids_TK.shape == (2, top_k)
