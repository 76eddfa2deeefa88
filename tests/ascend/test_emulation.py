"""The emulated HCCL notices ranks that disagree: what a real one would answer with a hang, or with garbage."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from epbackend.dispatch.base import RankGroup
from tests.helpers.ascend import REAL

pytestmark = pytest.mark.ascend


def refused(groups: dict[int, RankGroup], mistake: str) -> bool:
    """Whether this rank's part of a collective with a mistake in it is refused."""
    ranks = groups[1]
    other = ranks.rank == 1
    try:
        if mistake == "sizes":
            dist.all_reduce(torch.zeros(5 if other else 4, device="npu"), group=ranks.group)
        elif mistake == "types":
            dist.all_reduce(
                torch.zeros(4, dtype=torch.int32 if other else torch.float32).npu(), group=ranks.group
            )
        elif mistake == "collectives":
            part, whole = torch.zeros(2, device="npu"), torch.zeros(4, device="npu")
            call = dist.reduce_scatter_tensor if other else dist.all_gather_into_tensor
            call(*((part, whole) if other else (whole, part)), group=ranks.group)
        else:
            counts = [1, 2] if other else [3, 4]
            dist.all_to_all_single(
                torch.zeros(sum(counts)).npu(), torch.zeros(4).npu(), counts, [2, 2], group=ranks.group
            )
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("mistake", ["sizes", "types", "collectives", "splits"])
def test_collectives_that_ranks_call_differently_fail_on_all(ranks, npu, mistake):
    if npu == REAL:
        pytest.skip("real ranks that disagree hang")
    assert ranks.run(2, refused, mistake) == [True, True]
