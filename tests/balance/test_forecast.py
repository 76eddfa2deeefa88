"""Which way of predicting is taken, and that it is nearer to what comes."""

from __future__ import annotations

import numpy as np
import pytest

from epbackend.balance.forecast import LEAST_WINDOWS, WAYS, Forecast

pytestmark = pytest.mark.cpu
LAYERS, EXPERTS = 8, 32


def shares(seed):
    weight_YE = np.random.default_rng(seed).lognormal(0, 0.7, (LAYERS, EXPERTS))
    return weight_YE / weight_YE.sum(axis=1, keepdims=True)


def drawn(share_YE, choices=20_000, seed=0):
    return np.random.default_rng(seed).multinomial(choices, share_YE).astype(float)


def distance(one_YE, other_YE):
    return np.abs(one_YE - other_YE).sum(axis=1) / 2


def fed(windows):
    forecast = Forecast(LAYERS, EXPERTS)
    for tokens_YE in windows:
        forecast.observe(tokens_YE)
    return forecast


def test_a_steady_load_is_predicted_by_its_average_nearer_than_by_its_last_window():
    windows = [drawn(shares(1), seed=seed) for seed in range(20)]
    forecast = fed(windows)
    assert {WAYS[way] for way in forecast.way_Y} == {"average"}
    truth, last = shares(1), windows[-1] / windows[-1].sum(axis=1, keepdims=True)
    assert (distance(forecast.shares_YE, truth) < distance(last, truth)).all()
    judges_BE, weight_B = forecast.judges(0)
    assert len(judges_BE) > 4
    assert weight_B.sum() == pytest.approx(1)
    assert judges_BE[0] == pytest.approx(last[0])


def test_a_load_that_goes_over_evenly_is_predicted_by_its_trend():
    forecast = fed([shares(1) * (1 - t) + shares(2) * t for t in np.linspace(0, 0.9, 10)])
    assert {WAYS[way] for way in forecast.way_Y} == {"trend"}
    coming, last = shares(2), shares(1) * 0.1 + shares(2) * 0.9
    assert (distance(forecast.shares_YE, coming) < distance(last, coming)).all()


def test_a_load_that_jumps_is_followed_at_once():
    before, after = drawn(shares(1), 10**7), drawn(shares(2), 10**7)
    forecast = fed([before, before, before, after, after])
    assert {WAYS[way] for way in forecast.way_Y} == {"last"}
    assert distance(forecast.shares_YE, shares(2)).max() < 0.01


def test_no_other_way_is_trusted_before_it_was_judged():
    forecast = fed([drawn(shares(1), seed=seed) for seed in range(LEAST_WINDOWS - 1)])
    assert {WAYS[way] for way in forecast.way_Y} == {"last"}


def test_windows_without_tokens_change_nothing():
    windows = [drawn(shares(1), seed=seed) for seed in range(6)]
    nothing = np.zeros((LAYERS, EXPERTS))
    with_gaps = [nothing, *windows[:3], nothing, nothing, *windows[3:], *[nothing] * 9]
    forecast, without = fed(with_gaps), fed(windows)
    assert forecast.shares_YE == pytest.approx(without.shares_YE)
    shares_BE, weight_B = forecast.judges(0)
    assert shares_BE.sum(axis=1) == pytest.approx(1)
    assert weight_B.sum() == pytest.approx(1)
    assert not Forecast(LAYERS, EXPERTS).shares_YE.any()
