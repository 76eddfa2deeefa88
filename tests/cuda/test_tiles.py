"""The tile table: what a tuned entry replaces, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.kernels.triton import tiles
from epbackend.kernels.triton.chip import H100
from epbackend.kernels.triton.tiles import Product, choose_tile, record, table, tuned_for

pytestmark = pytest.mark.cpu
PRODUCT = Product("half", gated=True, rows=128 * 16, slots=128, height=1536, depth=2048)


@pytest.fixture
def copy_of_table(tmp_path, monkeypatch):
    """The table in a file of its own, read anew."""
    file = tmp_path / "tiles.json"
    file.write_text(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "TABLE", file)
    for cached in (table, choose_tile):
        cached.cache_clear()
    yield file
    for cached in (table, choose_tile):
        cached.cache_clear()


def test_a_tuned_tile_serves_its_own_product_alone(copy_of_table):
    family = choose_tile(H100, PRODUCT)
    found = replace(family, stages=9)
    for stages in (8, 9):  # the second time in the place of the first
        record(tuned_for(H100, PRODUCT, up_to=16), replace(found, stages=stages), "2026-01-01")
    assert len(json.loads(copy_of_table.read_text())["tuned"]) == 1 + len(table()["tuned"])
    for cached in (table, choose_tile):
        cached.cache_clear()
    assert choose_tile(H100, PRODUCT) == found
    assert choose_tile(H100, replace(PRODUCT, depth=4096)) == family
    assert choose_tile(replace(H100, name="another GPU"), PRODUCT) == family
    assert choose_tile(H100, replace(PRODUCT, rows=128 * 17)) != found


def test_writing_changes_one_line(copy_of_table):
    before = copy_of_table.read_text().splitlines()
    record(tuned_for(H100, PRODUCT, up_to=16), choose_tile(H100, PRODUCT), "2026-01-01")
    kept = set(before) & set(copy_of_table.read_text().splitlines())
    assert len(set(before) - kept) <= 1
