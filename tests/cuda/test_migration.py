"""Experts that move between the calls of a layer whose kernels are Triton's: the very bytes, and the same results."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.balance.board import PLACE
from epbackend.dispatch.base import RankGroup
from epbackend.kernels.triton.tiles import chip_of
from epbackend.placement.placement import Layout
from tests.helpers import migrating
from tests.helpers.migrating import EXPERTS, WAY, assert_all_counted, layouts, migrate, plans

pytestmark = pytest.mark.cuda

HARD = layouts(
    ((0, 1, 2, 3, 0), (4, 5, 6, 7, 1)),
    ((0, 1, 7, 3, 0), (4, 5, 6, 2, 0)),
    ((1, 5, 7, 3, 0), (4, 5, 6, 2, 4)),
)
"""For what has to keep its shapes: two experts with replicas, then one with three, then one with two on one rank."""


@pytest.fixture
def form(request, place):
    """The experts' weight format; skips where the chip does not multiply it."""
    if request.param == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "split"), [("bfloat16", "level"), ("int8", "even"), ("fp8", "even")], indirect=["form"]
)
def test_slots_get_the_bytes_of_their_experts_and_results_stay(ranks, tmp_path, form, split):
    np.zeros(2, PLACE).tofile(board := tmp_path / "board")
    seen = ranks.run(2, migrate, str(board), WAY[0], plans(WAY), form, 2, split, None, 1, "cuda")
    for each in seen:
        assert each.errors == ()
        assert each.flipped == (1, 2, 3, 4)
        assert each.held == WAY[-1].experts_of_rank
        assert each.right_bytes
        assert each.worst < 0.03


@pytest.mark.parametrize(
    ("form", "level", "split"),
    [
        ("float32", 1, "level"),
        pytest.param("bfloat16", 2, "even", marks=pytest.mark.slow),
        pytest.param("int8", 2, "level", marks=pytest.mark.slow),
        pytest.param("fp8", 1, "nearest", marks=pytest.mark.slow),
    ],
    indirect=["form"],
)
def test_what_a_graph_replays_follows_the_experts(cuda, ranks, tmp_path, form, level, split):
    """Nothing that a captured call hands to a kernel changes: neither addresses, nor numbers, nor grids."""
    if not cuda.emulated:
        pytest.skip("gloo joins these ranks, which no captured graph can hold: test_experts_move_on_gpus")
    np.zeros(2, PLACE).tofile(board := tmp_path / "board")
    options = form, level, split, None, 1, "cuda", True
    seen = ranks.run(2, migrate, str(board), HARD[0], plans(HARD), *options)
    for each in seen:
        assert each.errors == ()
        assert each.flipped == (1, 2)
        assert each.right_bytes
        assert each.worst < (1e-5 if form == "float32" else 0.03)
        assert each.same_launches
    assert_all_counted(seen)


@pytest.mark.parametrize(
    "form",
    ["float32", *(pytest.param(form, marks=pytest.mark.slow) for form in ("bfloat16", "int8", "fp8"))],
    indirect=True,
)
def test_a_captured_graph_follows_experts_that_change_places_on_their_rank(tmp_path, form):
    """A real graph where there is a GPU, with the stream and the memory of staging beside it."""
    way = [Layout((sum(layout.experts_of_rank, ()),), EXPERTS) for layout in HARD]
    np.zeros(1, PLACE).tofile(board := tmp_path / "board")
    alone = {1: RankGroup.single()}
    seen = migrate(alone, str(board), way[0], plans(way), form, 1, "even", None, 1, "cuda", True)
    assert seen.errors == ()
    assert seen.flipped == (1, 2)
    assert seen.right_bytes
    assert seen.worst < (1e-5 if form == "float32" else 0.03)
    assert_all_counted([seen])


def test_a_replay_that_gives_something_else_is_noticed(cuda, tmp_path, monkeypatch):
    """Every replay fills the same tensor: what one gave is gone with the next."""
    capture = migrating.captured

    def damaged(call, place):
        graph, out_TD = capture(call, place)
        replay, before = graph.replay, []

        def replay_or_damage() -> None:
            replay()
            out_TD.mul_(1 + len(before))
            before.append(True)

        return SimpleNamespace(replay=replay_or_damage, launches=None), out_TD

    monkeypatch.setattr(migrating, "captured", damaged)
    way = [Layout((sum(layout.experts_of_rank, ()),), EXPERTS) for layout in HARD[:2]]
    np.zeros(1, PLACE).tofile(board := tmp_path / "board")
    alone = {1: RankGroup.single()}
    seen = migrate(alone, str(board), way[0], plans(way), "float32", 1, "even", None, 1, "cuda", True)
    assert seen.flipped == (1,)
    assert seen.worst > 0.5
