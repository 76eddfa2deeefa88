"""Recorded loads: what they may hold, and how several windows become one."""

from __future__ import annotations

import numpy as np
import pytest

from epbackend.errors import ConfigError
from epbackend.placement import Loads


def test_one_array_is_one_window():
    loads = Loads.of(np.array([[0, 0, 0], [1, 2, 3]]))
    assert (loads.windows, loads.layers, loads.experts, loads.loaded_layers) == (1, 2, 3, (1,))
    assert loads.names == ("window 0",)
    assert loads.tokens_WYE.dtype == np.float64
    assert loads.mixture_YE().tolist() == [[0, 0, 0], [1, 2, 3]]


def test_loads_are_a_copy_that_cannot_be_written_to():
    array = np.ones((2, 3))
    loads = Loads.of(array)
    array[0, 0] = 7
    assert loads.tokens_WYE[0, 0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        loads.tokens_WYE[0, 0, 0] = 2


def test_in_a_mixture_windows_count_equally_whatever_their_tokens():
    loads = Loads.of([np.array([[10.0, 30.0]]), np.array([[300.0, 100.0]])])
    assert loads.mixture_YE() == pytest.approx(np.array([[110.0, 110.0]]))


def test_in_a_mixture_a_window_without_the_layer_does_not_count():
    loads = Loads.of([np.array([[10.0, 30.0], [0, 0]]), np.array([[0.0, 0.0], [0, 0]])])
    mixture_YE = loads.mixture_YE()
    assert mixture_YE[0] / mixture_YE[0].sum() == pytest.approx([0.25, 0.75])
    assert mixture_YE[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((0, 4)), r"shape is \(1, 0, 4\)"),
        (np.zeros((2, 0)), r"shape is \(1, 2, 0\)"),
        (np.zeros(4), r"must be \[windows, layers, experts\]"),
        (np.zeros((1, 1, 1, 4)), r"must be \[windows, layers, experts\]"),
        ([], r"must be \[windows, layers, experts\]"),
        ([np.ones((2, 4)), np.ones((2, 5))], r"window 1 has the shape \(2, 5\), window 0 has \(2, 4\)"),
        (np.array([[1, 2], [3, np.nan]]), "expert 1 of layer 1 in window 0 is not a finite number"),
        (np.array([[1, np.inf]]), "expert 1 of layer 0 in window 0 is not a finite number"),
        (
            [np.array([[1, 2]]), np.array([[1, -2]])],
            "expert 1 of layer 0 in window 1 is negative",
        ),
        (np.array([[1, 2.0**60]]), "expert 1 of layer 0 in window 0 is too large"),
        (np.array([["many", "few"]]), "not numbers in rows of equal length"),
        ([[[1, 2], [3]]], "not numbers in rows of equal length"),
    ],
)
def test_values_that_are_no_counts_are_refused(windows, message):
    with pytest.raises(ConfigError, match=message):
        Loads.of(windows)


def test_every_window_needs_a_name():
    with pytest.raises(ConfigError, match="2 windows have 1 names"):
        Loads(np.ones((2, 1, 3)), ("a",))
