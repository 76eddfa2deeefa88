"""Ids out of range are counted on the device and reported; nothing is ever written outside of a buffer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.errors import ConfigError
from epbackend.kernels.triton.guard import IdGuard

pytestmark = pytest.mark.cuda


def settle(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


def test_good_ids_pass(place):
    guard = IdGuard("slot ids", 8, place)
    for _ in range(2):
        guard.watch(torch.tensor([[-1, 0], [7, 3]], device=place))
        settle(place)
    guard.report()


def test_bad_ids_are_reported_by_a_later_call(place):
    guard = IdGuard("slot ids", 8, place)
    guard.watch(torch.tensor([[-1, 8], [70, -2]], device=place))
    settle(place)
    with pytest.raises(ConfigError, match=r"slot ids: 3 ids lay outside of \[-1, 8\), 70 among them"):
        guard.watch(torch.tensor([[0, 1]], device=place))


def test_permute_leaves_bad_ids_out(kernels, place):
    ids_TK = torch.tensor([[1 << 40, 0], [-(1 << 40), 2]], device=place)
    permuted = kernels.permute(torch.randn(2, 4, device=place), ids_TK, 2)
    assert permuted.counts_L.tolist() == [1, 0]
    assert permuted.source_S.tolist() == [1, -1, -1, -1]
