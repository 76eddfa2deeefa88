"""Ids out of range never lead to a write outside of a buffer, and are reported from captured graphs too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.errors import ConfigError
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas

pytestmark = pytest.mark.cuda


def test_permute_leaves_out_ids_out_of_range(kernels, place):
    ids_TK = torch.tensor([[1 << 40, 0], [-(1 << 40), 2]], device=place)
    permuted = kernels.permute(torch.randn(2, 4, device=place), ids_TK, 2)
    assert permuted.counts_L.tolist() == [1, 0]
    assert permuted.choice_of_row_S.tolist() == [1, -1, -1, -1]


@pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["triton", "grouped_mm"])
def test_an_id_out_of_range_in_a_replay_is_raised_by_the_next_call(cuda, name):
    place = cuda.torch_device(0)
    one = EvenReplicas(np.arange(4)[:, None], np.ones((4, 1), bool))
    split = cuda.kernel_set(name).even_split(one, place, ExpertIdCheck(4, place))
    ids_TK = torch.zeros(3, 2, dtype=torch.int64, device=place)
    split(ids_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slot_ids_TK = split(ids_TK)
    ids_TK[1, 1] = 9
    graph.replay()
    torch.cuda.synchronize()
    assert 0 <= int(slot_ids_TK.min()) <= int(slot_ids_TK.max()) < 4
    with pytest.raises(ConfigError, match="a token chose expert 9"):
        split(torch.zeros_like(ids_TK))
