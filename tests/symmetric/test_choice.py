"""When `symmetric` is taken, why not, and how much capacity it makes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from epbackend.device import devices
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.choose import choose
from epbackend.dispatch.deepep import DeepEp
from epbackend.dispatch.symmetric import RankLocation, Symmetric, location_conflict
from epbackend.dispatch.symmetric_memory import OPEN_TOKENS, ExchangeCapacity
from epbackend.errors import ConfigError
from epbackend.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.cpu


def spec(size: int = 8, token_size: int = 1, device: str = "cuda", **settings) -> LayerSpec:
    ranks = RankGroup(None, 0, size, None, 0, token_size)
    return LayerSpec(
        ranks, devices()[device], ReferenceKernels(), DispatchSettings(2, **settings), slots=4, top_k=8
    )


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (spec(size=1), "there is one rank"),
        (spec(device="cpu"), "needs device cuda, and the device is cpu"),
        (spec(static=True), "nothing bounds this phase's tokens"),
    ],
)
def test_specs_that_symmetric_cannot_serve(case, reason):
    assert reason in Symmetric.unsupported(case)


def test_deepep_is_taken_by_name_only_and_says_what_is_missing():
    assert DeepEp.unsupported(spec()) == "it is taken only where it is named"
    if find_spec("deep_ep") is None:
        with pytest.raises(
            ConfigError, match="deepep is pinned but cannot be used: deep_ep is not installed"
        ):
            choose(spec(dispatcher="deepep"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_torch_without_cuda_says_so():
    assert "is built without symmetric memory for CUDA" in Symmetric.unsupported(spec())
    assert "device cuda" in Symmetric.missing()
    with pytest.raises(
        ConfigError, match=r"symmetric is pinned but cannot be used: torch .* is built without"
    ):
        choose(spec(dispatcher="symmetric"))
    _, choice = choose(spec())
    assert choice.name == "alltoall"
    assert "without symmetric memory" in dict(choice.passed_over)["symmetric"]


@pytest.mark.parametrize(
    ("locations", "overlap", "reason"),
    [
        ([(1, 1), (1, 2), (1, 3)], False, None),
        ([(1, 1), (1, 2), (2, 3)], False, "ranks 4 and 6 are on different hosts"),
        ([(1, 1), (1, 2), (1, 2)], False, "ranks 5 and 6 share one GPU"),
        ([(1, 1), (1, 2), (1, 2)], True, None),
    ],
)
def test_ranks_on_different_hosts_or_one_gpu_are_refused(locations, overlap, reason):
    places = [RankLocation(*location) for location in locations]
    found = location_conflict(places, numbers=[4, 5, 6], may_overlap=overlap)
    assert found is None if reason is None else reason in found


def test_the_worst_case_fits_where_tokens_are_bounded():
    capacity = ExchangeCapacity.of(spec(max_tokens=128))
    assert capacity == ExchangeCapacity(tokens=128, rows=8 * 128 * 8, bounded=True)
    assert capacity.rounds_of(8 * 128 * 8) == 1


def test_ranks_that_share_tokens_send_a_part_each():
    assert ExchangeCapacity.of(spec(token_size=4, max_tokens=130)).tokens == 33


def test_unbounded_calls_have_buffers_of_the_usual_size():
    capacity = ExchangeCapacity.of(spec())
    assert (capacity.tokens, capacity.rows, capacity.bounded) == (OPEN_TOKENS, OPEN_TOKENS * 8 * 2, False)


def test_the_buffer_setting_sizes_the_receive_buffer():
    capacity = ExchangeCapacity.of(spec(max_tokens=128, buffer_scale_factors=((256, 0.1), (64, 1.5), (0, 3))))
    assert capacity.rows == 128 * 8 * 1.5
    assert capacity.rounds_of(8 * 128 * 8) == 6
