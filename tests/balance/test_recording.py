"""The windows of an engine that serves, in files that stay small and never stop it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from epbackend.balance import recording
from epbackend.balance.recording import MOST_WINDOWS, WindowsFile
from epbackend.errors import ConfigError
from epbackend.placement.formats import read_loads


def counted(windows: int, layers: int = 3, experts: int = 4) -> np.ndarray:
    """[W, 2, Y, E]: from the start on, as an engine counts; the first layer is dense, and no window is like another."""
    each = np.random.default_rng(0).integers(1, 100, (windows, 2, layers, experts))
    each[:, :, 0] = 0
    return each.cumsum(axis=0)


@pytest.mark.parametrize("windows", [1, MOST_WINDOWS, MOST_WINDOWS + 1, 5 * MOST_WINDOWS + 3])
def test_a_file_holds_all_windows_in_order_and_never_too_many(tmp_path, windows):
    counted_W2YE = counted(windows)
    file = WindowsFile(str(tmp_path / "loads.json"), "decode", "original")
    for counted_2YE in counted_W2YE:
        file.add(counted_2YE)
        file.add(counted_2YE)  # nothing happened since: no window
    file.save()
    loads = read_loads(tmp_path / "loads.json")
    span = max(1, 2 ** int(np.ceil(np.log2(windows / MOST_WINDOWS))))
    ends = [*range(span - 1, windows, span), *([windows - 1] if windows % span else [])]
    assert loads.windows == len(ends) <= MOST_WINDOWS
    assert np.array_equal(loads.tokens_WYE.cumsum(axis=0), counted_W2YE[ends, 1])
    assert loads.loaded_layers == (1, 2)
    assert loads.numbering == "original"


def test_a_name_with_phase_makes_a_file_of_each_and_none_of_a_phase_without_tokens(tmp_path):
    file = WindowsFile(str(tmp_path / "{phase}.json"), "both")
    first, second = counted(2)
    file.add(first * [[[1]], [[0]]])
    file.save()
    assert [each.name for each in tmp_path.iterdir()] == ["prefill.json"]
    file.add(second * [[[1]], [[0]]] + first * [[[0]], [[1]]])
    file.save()
    prefill, decode = (read_loads(tmp_path / f"{phase}.json") for phase in ("prefill", "decode"))
    assert np.array_equal(prefill.tokens_WYE, [first[0], second[0] - first[0]])
    assert np.array_equal(decode.tokens_WYE, [first[1]])


def test_a_model_that_counts_from_zero_again_goes_on_in_the_same_file(tmp_path):
    file = WindowsFile(str(tmp_path / "loads.json"), "both")
    first, second = counted(2)
    file.add(second)
    file.add(first)
    file.save()
    assert np.array_equal(read_loads(tmp_path / "loads.json").tokens_WYE, [second.sum(0), first.sum(0)])


def test_a_disk_that_is_full_is_one_warning_and_what_comes_later_is_written(tmp_path, monkeypatch, caplog):
    """The file of before stays whole meanwhile."""
    file = WindowsFile(str(tmp_path / "loads.json"), "both")
    counts = counted(4)
    file.add(counts[0])
    file.save()
    before = (tmp_path / "loads.json").read_bytes()
    monkeypatch.setattr(recording, "EVERY_S", 0.0)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "epbackend"):
        broken.setattr(Path, "write_bytes", full)
        file.save()
        for counted_2YE in counts[1:3]:
            file.add(counted_2YE)
    assert [record.getMessage() for record in caplog.records] == [
        f"balance.record: {tmp_path}/loads.json: cannot be written: No space left on device; serving goes on, and it "
        "is tried again"
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["loads.json"]
    assert (tmp_path / "loads.json").read_bytes() == before
    file.add(counts[3])
    assert np.array_equal(read_loads(tmp_path / "loads.json").tokens_WYE.sum(axis=0), counts[3].sum(axis=0))


def test_a_folder_that_is_missing_is_made(tmp_path):
    file = WindowsFile(str(tmp_path / "new" / "newer" / "{phase}.json"), "both")
    file.add(counted(1)[0])
    file.save()
    assert (tmp_path / "new" / "newer" / "decode.json").exists()


def full(path, content):
    """What a full disk does to a file: half of it is there."""
    path.write_text("{")
    raise OSError(28, "No space left on device")


def test_where_nothing_can_be_written_is_said_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "file" / "loads.json",
        tmp_path / "folder",
        tmp_path / "file" / "{phase}.json",
    ):
        with pytest.raises(
            ConfigError, match=r"balance\.record: .* cannot be written; name a file, in a folder"
        ):
            WindowsFile(str(path), "both")
