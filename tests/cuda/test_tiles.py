"""The tile table: what a tuned entry replaces, and what it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.errors import ConfigError
from epbackend.kernels.triton import tiles
from epbackend.kernels.triton.tiles import H100, Product, choose_tile, own_table, record, table, tuned_for

pytestmark = pytest.mark.cpu
PRODUCT = Product("half", gated=True, rows=128 * 16, slots=128, height=1536, depth=2048)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's own table, which is not there yet."""
    monkeypatch.setenv("EPBACKEND_TILES", str(tmp_path / "deep" / "tiles.json"))
    forget()
    yield tmp_path / "deep" / "tiles.json"
    forget()


def forget() -> None:
    for cached in (table, choose_tile, tiles._say_that_gluon_differs):
        cached.cache_clear()


def test_a_tuned_tile_serves_only_its_own_product(own):
    family = choose_tile(H100, PRODUCT)
    found = replace(family, stages=9)
    for stages in (8, 9):  # the second time in the place of the first
        record(own_table(), tuned_for(H100, PRODUCT, up_to=16), replace(found, stages=stages), "2026-01-01")
    assert len(json.loads(own.read_text())["tuned"]) == 1
    forget()
    assert choose_tile(H100, PRODUCT) == found
    assert choose_tile(H100, replace(PRODUCT, depth=4096)) == family
    assert choose_tile(replace(H100, name="another GPU"), PRODUCT) == family
    assert choose_tile(H100, replace(PRODUCT, rows=128 * 17)) != found


def test_the_users_table_comes_before_the_packaged_one(own):
    wanted = tuned_for(H100, PRODUCT, up_to=16)
    tile = choose_tile(H100, PRODUCT)
    packaged = own.with_name("packaged.json")
    packaged.parent.mkdir()
    packaged.write_text(tiles.PACKAGED.read_text())
    record(packaged, wanted, replace(tile, stages=8), "2026-01-01")
    with mock.patch.object(tiles, "PACKAGED", packaged):
        forget()
        assert choose_tile(H100, PRODUCT).stages == 8
        record(own_table(), wanted, replace(tile, stages=9), "2026-01-01")
        forget()
        assert choose_tile(H100, PRODUCT).stages == 9


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_another_triton_leaves_gluon_out_and_says_so_once(monkeypatch, caplog, form):
    many = replace(PRODUCT, weight_format=form, rows=128 * 500)
    forget()
    assert choose_tile(H100, many).specialize
    assert not choose_tile(H100, replace(many, aligned=False)).specialize
    monkeypatch.setattr(tiles.triton, "__version__", "3.9.1")
    forget()
    for gated in (True, False):
        assert not choose_tile(H100, replace(many, gated=gated)).specialize
    assert [record.getMessage()[:12] for record in caplog.records] == ["Triton 3.9.1"]
    assert not choose_tile(tiles.B200, many).specialize
    monkeypatch.undo()
    forget()


def test_recording_a_tile_changes_one_line(own):
    before = tiles.PACKAGED.read_text().splitlines()
    copy = own.with_name("copy.json")
    copy.parent.mkdir()
    copy.write_text("\n".join(before) + "\n")
    record(copy, tuned_for(H100, PRODUCT, up_to=16), choose_tile(H100, PRODUCT), "2026-01-01")
    kept = set(before) & set(copy.read_text().splitlines())
    assert len(set(before) - kept) <= 1
    assert [file.name for file in copy.parent.iterdir()] == ["copy.json"]


NOT_ENOUGH = {"rows": 64, "columns": 64, "depth": 64, "warps": 4, "stages": 4, "specialize": True}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"tuned": [{"tile": {"rows": 16, "hue": 3}}]}',
        json.dumps({"tuned": [{"tile": NOT_ENOUGH}]}),
    ],
)
def test_a_malformed_table_raises(own, text):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.raises(
        ConfigError, match=r"tiles.json is no table of tiles.*epbackend tune.*EPBACKEND_TILES"
    ):
        choose_tile(H100, PRODUCT)


def test_the_default_table_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("EPBACKEND_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert own_table() == tmp_path / "epbackend" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_table() == tmp_path / ".cache" / "epbackend" / "tiles.json"
