"""The search for the best tile: what is tried, what is kept, and what is dropped."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.kernels.triton import tuning
from epbackend.kernels.triton import tuning as candidates
from epbackend.kernels.triton.tiles import H100, Tile, chip_of, family_tiles
from epbackend.kernels.triton.tuning import ExpertShape, Job

SHAPE = ExpertShape("tiny", slots=2, D=128, F=128)
IN_USE = Tile(rows=16, columns=128, depth=128, warps=4, stages=2)
OTHERS = [Tile(rows=32, columns=128, depth=128, warps=4, stages=2), Tile(64, 128, 128, warps=4, stages=2)]


@pytest.mark.cpu
@pytest.mark.parametrize("form", ["half", "fp8", "int8"])
def test_every_entry_of_the_family_is_tuned(form):
    found = tuning.jobs(SHAPE, form, H100)
    assert len(found) == sum(len(family_tiles(H100, form, gated)) for gated in (True, False))
    for job in found:
        tiles = candidates(form, job.gated, IN_USE, H100)
        assert tiles[0] == IN_USE
        assert len(set(tiles)) == len(tiles) > 10


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["half", "fp8", "int8"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_fastest_right_tile_is_found(place, form, gated):
    """The clock is ours: one microsecond less for each tile that is timed."""
    if form == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")

    def clock(calls) -> float:
        calls[0]()
        clock.us -= 1
        return clock.us

    clock.us = 9
    finding = tuning.time_tiles(Job(SHAPE, form, gated, 4), IN_USE, OTHERS, 3, place, clock)
    assert finding.us == {IN_USE: 8, OTHERS[0]: 7, OTHERS[1]: 6}
    assert (finding.best, finding.dropped) == (OTHERS[1], ())
    assert str(finding).startswith("tiny ")
    assert "8.0 us -> 6.0 us" in str(finding)


@pytest.mark.cuda
def test_wrong_and_failing_tiles_are_dropped(place, monkeypatch):
    right = Job.run

    def run(job, data, tile, chip=None) -> torch.Tensor:
        if tile == OTHERS[1]:
            raise RuntimeError("out of resources: shared memory\nand more")
        return right(job, data, tile, chip) * (2 if tile == OTHERS[0] else 1)

    monkeypatch.setattr(Job, "run", run)
    finding = tuning.time_tiles(Job(SHAPE, "half", True, 4), IN_USE, OTHERS, 3, place, lambda calls: 1.0)
    assert list(finding.us) == [IN_USE]
    assert [text.partition(": Tile")[0] for text in finding.dropped] == [
        "wrong by 1.000",
        "out of resources: shared memory",
    ]


@pytest.mark.cuda
@pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="there is no GPU")
def test_on_this_gpu(place, tmp_path, monkeypatch):
    """All of it on one small product: processes that compile, graphs that are timed, a table that is written."""
    monkeypatch.setattr(tuning, "candidates", lambda *_: [IN_USE, *OTHERS])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    table = tmp_path / "tiles.json"
    job = Job(ExpertShape("small", slots=4, D=256, F=256), "half", True, 16)
    (finding,) = tuning.tune([job], chip_of(place), table)
    assert finding.us
    assert '"height": 512' in table.read_text()
