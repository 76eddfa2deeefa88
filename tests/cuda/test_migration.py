"""Experts that move between the calls of a layer whose kernels are Triton's: the very bytes, and the same results."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.balance.board import PLACE
from tests.helpers.migrating import WAY, migrate, plans

pytestmark = [pytest.mark.cuda, pytest.mark.several_ranks, pytest.mark.slow]


@pytest.mark.parametrize(("form", "split"), [("bfloat16", "level"), ("int8", "even"), ("fp8", "even")])
def test_slots_get_the_bytes_of_their_experts_and_results_stay(cuda, ranks, tmp_path, form, split):
    np.zeros(2, PLACE).tofile(board := tmp_path / "board")
    seen = ranks.run(2, migrate, str(board), WAY[0], plans(WAY), form, 2, split, None, 1, "cuda")
    for each in seen:
        assert each.errors == ()
        assert each.flipped == (1, 2, 3, 4)
        assert each.held == WAY[-1].experts_of_rank
        assert each.right_bytes
        assert each.worst < 0.03
