"""Synthetic loads: as asked for, always the same, and with the statistics of recorded ones."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from epbackend.errors import ConfigError
from epbackend.placement import synthetic_loads


def shares(loads) -> np.ndarray:
    return loads.tokens_WYE / loads.tokens_WYE.sum(axis=2, keepdims=True)


def distances(loads) -> list[float]:
    """Total variation distances of all pairs of windows, the mean over layers."""
    return [float(np.abs(a - b).sum(axis=1).mean() / 2) for a, b in combinations(shares(loads), 2)]


def test_shape_names_and_sums():
    loads = synthetic_loads(6, 16, tokens=1000, windows=3, dense_layers=2, seed=5)
    assert loads.tokens_WYE.shape == (3, 6, 16)
    assert loads.loaded_layers == (2, 3, 4, 5)
    assert (loads.tokens_WYE[:, 2:].sum(axis=2) == 1000).all()
    assert (loads.tokens_WYE % 1 == 0).all()
    assert loads.names == ("synthetic 5.0", "synthetic 5.1", "synthetic 5.2")


def test_the_seed_decides():
    first, again, other = (synthetic_loads(2, 8, windows=2, seed=seed).tokens_WYE for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_defaults_look_like_a_recording():
    # Recorded, six files of 58 layers: the quantiles 0.1, 0.5, 0.9 over layers are 3.6 to 4.9, 5.2 to 8.2 and 8.0 to
    # 11.4 for the maximum over the mean, and 0.04 to 0.10, 0.07 to 0.18 and 0.17 to 0.26 for the minimum; the median
    # standard deviation of the logarithms is 0.59 to 0.86 and their median skewness 0.20 to 0.46.
    relative_YE = shares(synthetic_loads(layers=1000))[0] * 256
    low, middle, high = np.quantile(relative_YE.max(axis=1), [0.1, 0.5, 0.9])
    assert 3.6 <= low <= 4.9
    assert 5.2 <= middle <= 8.2
    assert 8.0 <= high <= 11.5
    low, middle, high = np.quantile(relative_YE.min(axis=1), [0.1, 0.5, 0.9])
    assert 0.04 <= low <= 0.10
    assert 0.07 <= middle <= 0.18
    assert 0.17 <= high <= 0.26
    log_YE = np.log(relative_YE)
    centred_YE = log_YE - log_YE.mean(axis=1, keepdims=True)
    deviation_Y = log_YE.std(axis=1)
    assert 0.59 <= np.median(deviation_Y) <= 0.86
    assert 0.18 <= np.median((centred_YE**3).mean(axis=1) / deviation_Y**3) <= 0.46


@pytest.mark.parametrize("drift", [0.01, 0.055, 0.19, 0.4])
def test_windows_are_as_far_apart_as_asked(drift):
    loads = synthetic_loads(layers=100, windows=3, drift=drift)
    assert distances(loads) == pytest.approx([drift] * 3, rel=0.15)


def test_without_drift_windows_differ_by_chance_alone():
    assert max(distances(synthetic_loads(20, windows=2, drift=0))) < 0.002


def test_without_skew_all_experts_are_as_likely():
    assert shares(synthetic_loads(4, skew=0)) * 256 == pytest.approx(1, abs=0.02)


def test_more_skew_is_more_skewed():
    largest = [shares(synthetic_loads(skew=skew)).max(axis=2).mean() for skew in (0.0, 0.4, 0.8, 1.6, 1e6)]
    assert largest == sorted(largest)


def test_noise_multiplies_the_variance():
    def variance(noise: float) -> float:
        loads = synthetic_loads(4, 16, tokens=4096, skew=0, drift=0, windows=400, noise=noise)
        return float(loads.tokens_WYE.var(axis=0).mean())

    assert variance(0) == pytest.approx(4096 / 16 * 15 / 16, rel=0.1)
    assert variance(3) == pytest.approx(4 * variance(0), rel=0.1)


def test_a_single_expert_and_no_tokens():
    assert (synthetic_loads(2, 1, tokens=7).tokens_WYE == 7).all()
    assert synthetic_loads(2, 4, tokens=0).loaded_layers == ()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 0}, "layers: must be a whole number of 1 or more"),
        ({"experts": 2.5}, "experts: must be a whole number of 1 or more"),
        ({"windows": 0}, "windows: must be a whole number of 1 or more"),
        ({"tokens": -1}, "tokens: must be a whole number of 0 or more"),
        ({"skew": -0.1}, "skew: must be a number of 0 or more"),
        ({"noise": float("nan")}, "noise: must be a number of 0 or more"),
        ({"drift": 1.0}, "drift: must be a number from 0 to below 1"),
        ({"layers": 2, "dense_layers": 3}, "dense_layers: 3 are more than the 2 layers"),
    ],
)
def test_arguments_out_of_range_are_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        synthetic_loads(**asked)
