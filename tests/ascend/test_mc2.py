"""The fused dispatcher equals the dense reference, like the others; what it cannot take it refuses by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.layer_case import Case, layer_equals_dense
from contract.test_layer import REPLICAS, SHUFFLED, uneven

from epbackend.dispatch.settings import DispatchSettings

MC2 = DispatchSettings(level=2, max_tokens=16)
HIDDEN = 1024  # the least that A3 takes

pytestmark = pytest.mark.ascend


@pytest.mark.parametrize(("size", "token_size"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    "slots", [tuple(range(8)), REPLICAS, SHUFFLED], ids=["uniform", "replicas", "shuffled"]
)
def test_uneven_and_empty_ranks(ranks, npu, size, token_size, slots):
    case = Case(size, uneven(size // token_size), MC2, token_size, slots, dtype=torch.bfloat16, hidden=HIDDEN)
    seen = ranks.run(size, layer_equals_dense, replace(case, device="ascend"))
    assert {rank.dispatcher for rank in seen} == {"mc2"}
    computed = torch.tensor([rank.tokens_E for rank in seen]).sum(0)
    assert torch.equal(computed, torch.tensor([rank.chosen_E for rank in seen[::token_size]]).sum(0))
