"""Loads and placements beside a renumbered checkpoint: translated or refused, where it is known whose numbers count."""

from __future__ import annotations

import numpy as np
import pytest

from epbackend.errors import ConfigError
from epbackend.placement import plan
from epbackend.placement.formats import read_loads, read_placement, write
from epbackend.placement.loads import ORIGINAL, Loads
from epbackend.placement.placement import Layout, Placement
from epbackend.placement.renumbering import (
    FILE,
    Renumbering,
    fingerprint,
    loads_for,
    numbering_of,
    placement_for,
)
from epbackend.placement.score import score

pytestmark = pytest.mark.cpu

TOKENS_YE = np.array([[0.0, 0, 0, 0], [40, 30, 20, 10]])
NEW_YE = np.array([[0.0, 0, 0, 0], [10, 40, 30, 20]])
"""The same, as the renumbered checkpoint counts."""


@pytest.fixture
def renumbering():
    return Renumbering(np.array([[0, 1, 2, 3], [3, 0, 1, 2]]), (fingerprint(TOKENS_YE),), {"a": 8})


def loads(tokens_YE=TOKENS_YE, numbering=None):
    return Loads.of(tokens_YE, ["recorded"], numbering)


def test_its_file_gives_it_back(renumbering, tmp_path):
    (tmp_path / FILE).write_text(renumbering.to_json())
    read = Renumbering.beside(tmp_path)
    assert read.to_json() == renumbering.to_json()
    assert (read.name, read.changed, read.headers) == (renumbering.name, (1,), {"a": 8})
    assert Renumbering.beside(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is no renumbering"),
        ('{"format": "epbackend-renumbering", "version": 2}', "version: 2"),
        ('{"format": "epbackend-renumbering", "version": 1, "experts": 0, "old_numbers": [[]]}', "needs"),
        (
            '{"format": "epbackend-renumbering", "version": 1, "experts": 2, "old_numbers": [[0, 0]], '
            '"planned_on": [], "headers": {}}',
            r"layers\[0\]: must hold each expert",
        ),
        (
            '{"format": "epbackend-renumbering", "version": 1, "experts": 2, "old_numbers": [[0, "1"]]}',
            r"old_numbers\[0\]: must be null or 2 experts",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(text, said, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{FILE}: .*{said}"):
        Renumbering.beside(tmp_path)


def test_loads_of_the_original_are_translated(renumbering, caplog):
    for known in (
        loads(numbering=ORIGINAL),
        loads(),
    ):  # the very window that it was planned on is known by its counts
        translated = loads_for(renumbering, known)
        np.testing.assert_array_equal(translated.tokens_WYE[0], NEW_YE)
        assert translated.numbering == renumbering.name
    own = loads(NEW_YE, renumbering.name)
    assert loads_for(renumbering, own) is own
    assert caplog.text == ""


def test_loads_that_do_not_say_are_taken_as_they_are_with_a_warning(renumbering, caplog):
    unknown = loads(NEW_YE)
    assert loads_for(renumbering, unknown) is unknown
    assert "does not say" in caplog.text
    assert loads_for(None, unknown) is unknown


def test_what_counts_by_another_checkpoint_is_refused(renumbering):
    for given in (None, renumbering):
        with pytest.raises(
            ConfigError, match=r"loads: recorded count experts by the numbers of the renumbered .* other"
        ):
            loads_for(given, loads(numbering="other"))
    placement = plan(loads(numbering="other"), ranks=2)
    with pytest.raises(ConfigError, match=r"placement: it counts experts by the numbers of .* other"):
        placement_for(renumbering, placement)


@pytest.mark.parametrize(
    ("old_YE", "said"),
    [
        ([[1, 0, 2, 3]], "layers: 2, but the renumbered checkpoint has 1"),
        ([[2, 1, 0]] * 2, "experts: 4, but .* 3"),
    ],
)
def test_what_counts_the_experts_of_another_model_is_refused(old_YE, said):
    renumbering, known = Renumbering(np.array(old_YE)), loads(numbering=ORIGINAL)
    with pytest.raises(ConfigError, match=said):
        loads_for(renumbering, known)
    with pytest.raises(ConfigError, match=said):
        placement_for(renumbering, plan(known, ranks=2))


def test_a_placement_of_the_original_is_translated(renumbering, tmp_path):
    planned = plan(loads(numbering=ORIGINAL), ranks=2)
    write(planned, tmp_path / "placement.json", "epbackend")
    translated = placement_for(renumbering, read_placement(tmp_path / "placement.json"))
    held = [[renumbering.old_YE[1][new] for new in rank] for rank in translated.layers[1].experts_of_rank]
    assert held == [list(rank) for rank in planned.layers[1].experts_of_rank]
    assert placement_for(renumbering, translated) is translated
    assert placement_for(None, planned) is planned
    unknown = Placement((Layout.even(4, 2),) * 2)
    assert placement_for(renumbering, unknown) is unknown


def test_a_placement_is_not_judged_by_loads_of_other_numbers(renumbering):
    planned = plan(loads(numbering=ORIGINAL), ranks=2)
    assert score(planned, loads()).imbalance_mean == score(planned, loads(numbering=ORIGINAL)).imbalance_mean
    with pytest.raises(ConfigError, match="but the placement by those of original"):
        score(planned, loads(NEW_YE, renumbering.name))


def test_files_say_whose_numbers_they_count(renumbering, tmp_path):
    for numbering in (None, ORIGINAL, numbering_of(renumbering)):
        write(loads(numbering=numbering), tmp_path / f"{numbering}.json", "sglang")
        assert read_loads(tmp_path / f"{numbering}.json").numbering == numbering
    assert read_loads([tmp_path / "None.json", tmp_path / "original.json"]).numbering == ORIGINAL
    with pytest.raises(ConfigError, match="count experts by different numbers"):
        read_loads([tmp_path / "original.json", tmp_path / f"{renumbering.name}.json"])
