"""Speeds of ranks from their calls of experts: told apart from their load, and steady under noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epbackend.balance.speed import WINDOWS, SpeedWatch, relative_speeds
from epbackend.moe import ExpertWork

MARGIN = 0.25


def work(speed_R, seed, noise=0.1, cost=(20e-6, 1e-6, 30e-6), calls=200) -> np.ndarray:
    """A window of ranks of these speeds, the first of which always has most to do."""
    draw = np.random.default_rng(seed)
    work_R44 = np.zeros((len(speed_R), 4, 4))
    for rank, speed in enumerate(speed_R):
        mean_C = draw.choice([0.5, 20], calls) / (1 + rank)  # decoding, or reading prompts
        counts_CL = draw.poisson(mean_C[:, None], (calls, 8))
        given_C3 = np.column_stack([np.ones(calls), counts_CL.sum(axis=1), (counts_CL > 0).sum(axis=1)])
        seconds_C = given_C3 @ cost / speed * draw.lognormal(0, noise, calls)
        call_C4 = np.column_stack([given_C3, seconds_C])
        work_R44[rank] = call_C4.T @ call_C4
    return work_R44


def test_calls_are_added_up():
    work_44 = np.zeros((4, 4))
    counted = ExpertWork(work_44)
    counted.add(torch.tensor([2, 0, 3]), 0.5)
    counted.add(torch.tensor([0, 0, 0]), 0.25)
    counted.add(torch.tensor([1, 0, 0]), 0.25)
    calls_C4 = np.array([[1, 5, 2, 0.5], [1, 1, 1, 0.25]])
    np.testing.assert_allclose(work_44, calls_C4.T @ calls_C4)


@pytest.mark.parametrize(("ranks", "empty"), [(4, 0.5), (2, 0.9)])
def test_calls_without_rows_make_no_rank_look_slow_or_fast(ranks, empty):
    """They take a fifth of the time of a call with a single row, which the cost of a call cannot explain."""
    draw = np.random.default_rng(0)
    work_R44 = np.zeros((ranks, 4, 4))
    for rank in range(ranks):
        counted = ExpertWork(work_R44[rank])
        for _ in range(400):
            counts_L = draw.poisson(0.5, 8) * (rank > 0 or draw.random() > empty)
            seconds = 350e-6 + 1e-6 * counts_L.sum() if counts_L.any() else 67e-6
            counted.add(torch.from_numpy(counts_L), seconds * draw.lognormal(0, 0.1))
    speed_R = relative_speeds(work_R44)
    np.testing.assert_allclose(speed_R / speed_R.max(), 1, atol=0.05)


@pytest.mark.parametrize("cost", [(20e-6, 1e-6, 30e-6), (0, 1e-5, 0), (1e-3, 0, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_a_slow_rank_is_told_from_one_with_much_to_do(seed, cost):
    speed_R = np.random.default_rng(seed).uniform(0.25, 1, 4)
    found_R = relative_speeds(work(speed_R, seed, cost=cost))
    np.testing.assert_allclose(found_R / found_R.max(), speed_R / speed_R.max(), rtol=0.1)


def test_a_rank_without_a_call_says_nothing():
    work_R44 = work([1, 1], 0)
    work_R44[1] = 0
    assert relative_speeds(work_R44) is None
    watch = SpeedWatch(np.zeros((2, 4, 4)), MARGIN)
    assert not any(watch.observe(work_R44) for _ in range(5))


def changes_of(windows, ranks=4, rank_speed=()):
    """(window, speeds) whenever others come into use."""
    so_far_R44 = np.zeros((ranks, 4, 4))
    watch, changes = SpeedWatch(so_far_R44, MARGIN, rank_speed), []
    for number, speed_R in enumerate(windows):
        so_far_R44 = so_far_R44 + work(speed_R, number, calls=60)
        if watch.observe(so_far_R44):
            changes.append((number, watch.rank_speed))
    return changes


@pytest.mark.parametrize("partly", [0.55, 0.7])
def test_a_slow_rank_is_heeded_and_comes_back_also_if_it_changes_within_a_window(partly):
    fast, between, slow = ([1.0, 1.0, speed, 1.0] for speed in (1.0, partly, 0.4))
    changes = changes_of([fast] * 5 + [between] + [slow] * 8 + [between] + [fast] * 8)
    began, ended = ([each for each in changes if (each[0] < 14) == early] for early in (True, False))
    for first, last in ((5, began), (14, ended)):
        assert 1 <= len(last) <= WINDOWS
        assert first < last[0][0] <= last[-1][0] < first + 2 * WINDOWS
    speeds = began[-1][1]
    assert speeds[2] == pytest.approx(0.4, rel=MARGIN / (1 - MARGIN))
    assert (speeds[0], speeds[1], speeds[3]) == (1.0, 1.0, 1.0)
    assert ended[-1][1] == ()


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_single_windows_move_nothing(seed):
    draw = np.random.default_rng(seed)
    windows = [draw.uniform(0.9, 1.0, 4) for _ in range(20)]
    for bad in (4, 9, 14):
        windows[bad][draw.integers(4)] = 0.2
    assert not changes_of(windows)


def test_speeds_that_are_given_stay_while_they_are_right():
    assert not changes_of([[1.0, 0.5]] * 6, ranks=2, rank_speed=(1.0, 0.5))
    assert changes_of([[1.0, 1.0]] * 6, ranks=2, rank_speed=(1.0, 0.5))[-1][1] == ()
