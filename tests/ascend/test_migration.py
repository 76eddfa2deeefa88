"""Experts that move between the calls of a layer on NPUs: staged on the host, flipped in the device's memory."""

from __future__ import annotations

import numpy as np
import pytest

from epbackend.balance.board import PLACE
from tests.helpers.migrating import WAY, assert_all_counted, migrate, plans

pytestmark = pytest.mark.ascend


@pytest.mark.parametrize(("form", "split"), [("bfloat16", "level"), ("W8A8 tiles", "even")])
def test_slots_get_the_bytes_of_their_experts_and_results_stay(npu, ranks, tmp_path, form, split):
    """Plain matrices, and int8 ones in FRACTAL_NZ."""
    np.zeros(2, PLACE).tofile(board := tmp_path / "board")
    seen = ranks.run(2, migrate, str(board), WAY[0], plans(WAY), form, 2, split, None, 1, "ascend")
    for each in seen:
        assert each.errors == ()
        assert each.flipped == (1, 2, 3, 4)
        assert each.held == WAY[-1].experts_of_rank
        assert each.right_bytes
        assert each.worst < 0.03
        assert ("FRACTAL_NZ" in each.layout) == (form == "W8A8 tiles")
    assert_all_counted(seen)
