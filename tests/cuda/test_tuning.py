"""The search for the best tile: what is tried, what is kept, and what is dropped."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from benchmarks.cuda.cases import QWEN3
from benchmarks.cuda.shortlist import shortlist
from benchmarks.cuda.tune import merge
from epbackend.kernels.triton import tuning
from epbackend.kernels.triton.tiles import H100, Tile, chip_of, choose_tile, family_tiles, record
from epbackend.kernels.triton.tuning import ExpertShape, TuningCase, candidates, shared_bytes

SHAPE = ExpertShape("tiny", slots=2, D=128, F=128)
IN_USE = Tile(rows=16, columns=128, depth=128, warps=4, stages=2)
OTHERS = [Tile(rows=32, columns=128, depth=128, warps=4, stages=2), Tile(64, 128, 128, warps=4, stages=2)]


@pytest.mark.cpu
@pytest.mark.parametrize("weight_format", ["half", "fp8", "int8"])
def test_every_entry_of_the_family_table_is_tuned(weight_format):
    found = tuning.tuning_cases(SHAPE, weight_format, H100)
    kinds = [family_tiles(H100, weight_format, gated) for gated in (True, False)]
    assert len(found) == sum(len({entry["up_to"] for entry in kind}) for kind in kinds)
    for case in found:
        tiles = candidates(case, IN_USE, H100)
        assert tiles[0] == IN_USE
        assert len(set(tiles)) == len(tiles) > 10
        assert {tile.rows for tile in tiles} >= {choose_tile(H100, case.product).rows}


@pytest.mark.cpu
def test_the_shortlist_is_short_and_fits():
    for case in tuning.tuning_cases(QWEN3, "half", H100):
        in_use = choose_tile(H100, case.product)
        tiles = shortlist(case, in_use, H100)
        assert tiles[0] == in_use
        assert len(tiles) <= 16
        for tile in tiles:
            assert tile.programs * shared_bytes(tile, "half", case.gated, H100) <= H100.shared_bytes


@pytest.mark.cpu
def test_a_kernel_is_compiled_once_for_all_numbers_of_rows():
    class Pool:
        submitted = 0

        def submit(self, *arguments) -> Future:
            self.submitted += 1
            return Future()

    pool = Pool()
    compiles = tuning.Compiles(pool, H100)
    begun = [compiles.begun(TuningCase(SHAPE, "half", True, rows), IN_USE) for rows in (4, 8)]
    assert begun[0] is begun[1]
    assert compiles.begun(TuningCase(SHAPE, "half", False, 4), IN_USE) is not begun[0]
    assert compiles.begun(TuningCase(SHAPE, "half", True, 4), OTHERS[0]) is not begun[0]
    assert pool.submitted == 3


@pytest.mark.cuda
@pytest.mark.parametrize("weight_format", ["half", "fp8", "int8"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_fastest_right_tile_is_the_best(place, weight_format, gated):
    """The clock is ours: one microsecond less for each timing."""
    if weight_format == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")

    def clock(calls) -> float:
        calls[0]()
        clock.us -= 1
        return clock.us

    clock.us = 9
    result = tuning.time_tiles(TuningCase(SHAPE, weight_format, gated, 4), IN_USE, OTHERS, 3, place, clock)
    assert result.us == {IN_USE: 5, OTHERS[0]: 4, OTHERS[1]: 3}  # the second of three turns
    assert (result.best, result.dropped) == (OTHERS[1], ())
    assert str(result).startswith("tiny ")
    assert "5.0 us -> 3.0 us" in str(result)


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
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_rank_of_two_slots_has_rows_to_tune_with(gated, place):
    """A quarter of a row for each slot, as the table's first entries are for."""
    case = TuningCase(ExpertShape("few", slots=2, D=128, F=128, top_k=1), "half", gated, 0.25)
    data = case.draw(place)
    assert len(case.run(data, replace(IN_USE, rows=16), H100 if knobs.runtime.interpret else None))


@pytest.mark.cuda
@pytest.mark.skipif(knobs.runtime.interpret or not torch.cuda.is_available(), reason="there is no GPU")
def test_tuning_on_this_gpu_writes_a_table(place, tmp_path, monkeypatch):
    """All of it on one small product: processes that compile, graphs that are timed, a table that is written."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    table = tmp_path / "tiles.json"
    case = TuningCase(ExpertShape("small", slots=4, D=256, F=256), "half", True, 16)
    (result,) = tuning.tune([case], chip_of(place), table, lambda *_: [IN_USE, *OTHERS])
    assert result.us
    assert '"height": 512' in table.read_text()


@pytest.mark.cpu
def test_a_table_that_was_measured_elsewhere_is_merged(tmp_path):
    source, target = tmp_path / "source.json", tmp_path / "target.json"
    key = {"chip": H100.name, "up_to": None}
    record(source, key, IN_USE, "2026-01-02")
    for up_to, tile in ((None, OTHERS[0]), (16, OTHERS[1])):
        record(target, {**key, "up_to": up_to}, tile, "2026-01-01")
    merge(source, target)
    merged = json.loads(target.read_text())["tuned"]
    assert [(each["up_to"], each["tile"], each["date"]) for each in merged] == [
        (16, asdict(OTHERS[1]), "2026-01-01"),
        (None, asdict(IN_USE), "2026-01-02"),
    ]
