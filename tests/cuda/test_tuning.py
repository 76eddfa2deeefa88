"""The search for the best tile: what is tried, what is kept, and what is dropped."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.kernels.triton import tuning
from epbackend.kernels.triton.tiles import H100, Tile, chip_of, family_tiles
from epbackend.kernels.triton.tuning import ExpertShape, TuningCase, candidates

SHAPE = ExpertShape("tiny", slots=2, D=128, F=128)
IN_USE = Tile(rows=16, columns=128, depth=128, warps=4, stages=2)
OTHERS = [Tile(rows=32, columns=128, depth=128, warps=4, stages=2), Tile(64, 128, 128, warps=4, stages=2)]


@pytest.mark.cpu
@pytest.mark.parametrize("weight_format", ["half", "fp8", "int8"])
def test_every_entry_of_the_family_table_is_tuned(weight_format):
    found = tuning.tuning_cases(SHAPE, weight_format, H100)
    assert len(found) == sum(len(family_tiles(H100, weight_format, gated)) for gated in (True, False))
    for case in found:
        tiles = candidates(weight_format, case.gated, IN_USE, H100)
        assert tiles[0] == IN_USE
        assert len(set(tiles)) == len(tiles) > 10


@pytest.mark.cuda
@pytest.mark.parametrize("weight_format", ["half", "fp8", "int8"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_fastest_right_tile_is_the_best(place, weight_format, gated):
    """The clock is ours: one microsecond less for each tile that is timed."""
    if weight_format == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")

    def clock(calls) -> float:
        calls[0]()
        clock.us -= 1
        return clock.us

    clock.us = 9
    result = tuning.time_tiles(TuningCase(SHAPE, weight_format, gated, 4), IN_USE, OTHERS, 3, place, clock)
    assert result.us == {IN_USE: 8, OTHERS[0]: 7, OTHERS[1]: 6}
    assert (result.best, result.dropped) == (OTHERS[1], ())
    assert str(result).startswith("tiny ")
    assert "8.0 us -> 6.0 us" in str(result)


@pytest.mark.cuda
def test_wrong_and_failing_tiles_are_dropped(place, monkeypatch):
    right = TuningCase.run

    def run(case, data, tile, chip=None) -> torch.Tensor:
        if tile == OTHERS[1]:
            raise RuntimeError("out of resources: shared memory\nand more")
        return right(case, data, tile, chip) * (2 if tile == OTHERS[0] else 1)

    monkeypatch.setattr(TuningCase, "run", run)
    result = tuning.time_tiles(
        TuningCase(SHAPE, "half", True, 4), IN_USE, OTHERS, 3, place, lambda calls: 1.0
    )
    assert list(result.us) == [IN_USE]
    assert [text.partition(": Tile")[0] for text in result.dropped] == [
        "wrong by 1.000",
        "out of resources: shared memory",
    ]


@pytest.mark.cuda
@pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="there is no GPU")
def test_tuning_on_this_gpu_writes_a_table(place, tmp_path, monkeypatch):
    """All of it on one small product: processes that compile, graphs that are timed, a table that is written."""
    monkeypatch.setattr(tuning, "candidates", lambda *_: [IN_USE, *OTHERS])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    table = tmp_path / "tiles.json"
    case = TuningCase(ExpertShape("small", slots=4, D=256, F=256), "half", True, 16)
    (result,) = tuning.tune([case], chip_of(place), table)
    assert result.us
    assert '"height": 512' in table.read_text()
