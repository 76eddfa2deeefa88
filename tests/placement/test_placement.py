"""Placements: layers that agree, and JSON that comes back the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import epbackend.placement as placement_package
from epbackend.errors import ConfigError
from epbackend.placement import Layout, Placement, Provenance
from tests.helpers.placement_strategies import placements

PLAIN = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(placements())
def test_json_gives_the_placement_back(placement):
    text = placement.to_json()
    assert Placement.from_json(text) == placement
    assert Placement.from_json(text).to_json() == text


@given(
    st.text(),
    st.lists(st.text()),
    st.dictionaries(st.text(), PLAIN | st.lists(st.lists(st.integers()))),
)
def test_json_keeps_where_it_came_from(algorithm, loads, options):
    provenance = Provenance(algorithm, tuple(loads), "1.2.3", tuple(sorted(options.items())))
    placement = replace(Placement.even(1, 4, 2), node_size=1, provenance=provenance)
    assert Placement.from_json(placement.to_json()) == placement


def test_json_has_a_line_for_each_layer():
    text = Placement((Layout(((0, 1), (2,)), 3), Layout.even(3, 2))).to_json()
    assert text.endswith('"layers": [\n[[0,1],[2]],\n[[0],[1,2]]\n]\n}\n')


def test_lists_and_numbers_of_numpy_are_as_good_as_tuples_and_ints():
    layout = Layout([list(np.array([0, 1])), [np.int32(2)]], 3)
    assert layout == Layout(((0, 1), (2,)), 3)
    assert Placement((layout,)).to_json() == Placement((Layout(((0, 1), (2,)), 3),)).to_json()
    with pytest.raises(ConfigError, match="rank 1 has no slot"):
        Layout([[0], []], 1)


def test_a_placement_cannot_be_changed():
    placement = Placement.even(2, 4, 2)
    with pytest.raises(FrozenInstanceError):
        placement.node_size = 2
    assert hash(placement) == hash(Placement.even(2, 4, 2))


def test_slots_are_none_where_layers_differ():
    assert Placement.even(2, 4, 2, 6).slots == 6
    assert Placement((Layout.even(4, 2), Layout.even(4, 2, 6))).slots is None


@pytest.mark.parametrize(
    ("layers", "node_size", "message"),
    [
        ((), 0, "no layer"),
        (
            (Layout.even(4, 2), Layout.even(4, 4)),
            0,
            "layer 1 has 4 experts on 4 ranks, but layer 0 has 4 on 2",
        ),
        ((Layout.even(4, 2), Layout.even(6, 2)), 0, "layer 1 has 6 experts"),
        ((Layout.even(4, 4),), 3, "node_size: 3 ranks a node do not divide the 4 ranks"),
        ((Layout.even(4, 4),), -1, "node_size: -1"),
    ],
)
def test_layers_that_disagree_are_refused(layers, node_size, message):
    with pytest.raises(ConfigError, match=message):
        Placement(layers, node_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, '"format" must be'),
        ({"version": 2}, "version: 2 is unknown"),
        ({"experts": "4"}, "experts: must be a whole number"),
        ({"experts": True}, "experts: must be a whole number"),
        ({"experts": 10**12}, "no slot holds expert 4"),
        ({"node_size": None}, "node_size: must be a whole number"),
        ({"node_size": 3}, "node_size: 3"),
        ({"ranks": 3}, "ranks: 3, but the layers hold 2"),
        ({"layers": {}}, "layers: must be a list"),
        ({"layers": []}, "no layer"),
        ({"layers": [3]}, r"layers\[0\]: must be a list of ranks"),
        ({"layers": [[[0, 1], [2, "3"]]]}, r"layers\[0\]: expert numbers must be whole"),
        ({"layers": [[[0, 1], [2, 3.0]]]}, r"layers\[0\]: expert numbers must be whole"),
        ({"layers": [[[0, 1], [2, 4]]]}, "holds expert 4"),
        ({"provenance": []}, "provenance: must be an object"),
        ({"provenance": {"algorithm": 1}}, "provenance: needs"),
        ({"provenance": {"algorithm": "", "version": "", "options": {}, "loads": [1]}}, "provenance.loads"),
    ],
)
def test_json_with_a_wrong_field_is_refused(changes, message):
    data = json.loads(Placement.even(1, 4, 2).to_json())
    with pytest.raises(ConfigError, match=message):
        Placement.from_json(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2", "[" * 100_000, "null", '"epbackend-placement"', "9" * 10_000]
)
def test_text_that_is_no_placement_is_refused(text):
    with pytest.raises(ConfigError, match="placement: is not"):
        Placement.from_json(text)


def test_the_package_loads_without_numba_and_torch():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['numba', 'torch', 'pydantic', 'lmdeploy']));"
        "from epbackend.placement import Placement, count_moves, plan, synthetic_loads;"
        "loads = synthetic_loads(2, 8);"
        "placement = [plan(loads, ranks=4, slots=12, algorithm=name) for name in ('eplb', 'omni', 'lplb')][0];"
        "print(Placement.from_json(placement.to_json()) == placement, count_moves(placement, placement).total)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["True", "0"], "")


def test_every_name_that_the_package_promises_is_there():
    for name in placement_package.__all__:
        assert getattr(placement_package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'plann'"):
        _ = placement_package.plann
