"""Made-up loads that look like recorded ones, and batches drawn from loads: tests, examples and benchmarks need no
recording."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from epbackend.errors import ConfigError, real_number, whole_number
from epbackend.placement.loads import Loads

# Loads
#
# The model was fitted by hand to six recordings of DeepSeek-V3 (58 MoE layers of 256 experts, decode and prefill):
#
# * The logarithm of an expert's load is a normal variable plus an exponential one (TAIL), so that a few experts stand
#   out and none vanish. No expert gets much more than LIMIT times the mean, as a token chooses each expert only once.
# * `skew` is the standard deviation of the logarithm, before the limit makes it 7% smaller. Recorded are 0.59 (decode)
#   to 0.86 (prefill of 4096 tokens), median 0.69. Layers differ in it by a log-normal factor (SPREAD).
# * `drift` is the total variation distance between two windows: recorded are 0.01 to 0.11 between windows of the same
#   phase (median 0.055), and 0.18 to 0.20 between decode and prefill.
#
# How close it comes, as the maximum over the mean of a layer at the quantiles 0.1, 0.5 and 0.9 of the layers, and as
# the imbalance that EPLB leaves (its mean over layers) with 272, 288, 320 and 288 slots on 16, 32, 64 and 144 ranks:
#
#   recorded  3.6 to 4.9  5.2 to 8.2  8.0 to 11.4    1.002 to 1.003  1.006 to 1.007  1.016 to 1.021  1.16 to 1.26
#   defaults  4.4         6.8         11.3           1.002           1.007           1.018           1.17

TAIL = 0.6
"""Weight of the exponential variable in the logarithm of a load; its variance is the square of that."""
LIMIT = 16.0
"""Times the mean load: where the load of an expert saturates."""
SPREAD = 0.16
"""Standard deviation of the logarithm of a layer's skew."""
TINY = np.finfo(float).tiny


def synthetic_loads(
    layers: int = 58,
    experts: int = 256,
    *,
    tokens: int = 2**26,
    skew: float = 0.74,
    drift: float = 0.055,
    noise: float = 0.0,
    windows: int = 1,
    dense_layers: int = 0,
    seed: int = 0,
) -> Loads:
    """The same arguments give the same loads. The defaults look like a recording of DeepSeek-V3's MoE layers.

    Args:
        layers: Y, of which the first `dense_layers` have no experts and stay all zero.
        experts: E.
        tokens: choices in each layer and window, which is tokens times experts per token.
        skew: how unequal the experts of a layer are, see above; 0 makes all equally likely.
        drift: total variation distance of any two windows, 0 or more and below 1; no more than the skew allows.
        noise: 0 if tokens choose independently; above, they are clustered and the variance is 1 + noise times as large.
        windows: W.
        dense_layers: layers without experts, in front.
        seed: of all random numbers.

    Raises:
        ConfigError: a value is out of its range.
    """
    windows, layers = whole_number("windows", windows, 1), whole_number("layers", layers, 1)
    experts, tokens = whole_number("experts", experts, 1), whole_number("tokens", tokens)
    dense_layers, seed = whole_number("dense_layers", dense_layers), whole_number("seed", seed)
    skew, noise, drift = (
        real_number("skew", skew),
        real_number("noise", noise),
        real_number("drift", drift, below=1),
    )
    if dense_layers > layers:
        raise ConfigError(f"dense_layers: {dense_layers} are more than the {layers} layers")
    random = np.random.default_rng(seed)
    chance_WYE = _chances(random, (windows, layers - dense_layers, experts), skew, drift)
    if noise:
        chance_WYE = _shares(random.gamma(chance_WYE * tokens / noise) + TINY)
    tokens_WYE = np.zeros((windows, layers, experts))
    tokens_WYE[:, dense_layers:] = random.multinomial(tokens, chance_WYE)
    return Loads(tokens_WYE, tuple(f"synthetic {seed}.{window}" for window in range(windows)))


def _chances(
    random: np.random.Generator, shape_WYE: tuple[int, int, int], skew: float, drift: float
) -> np.ndarray:
    """The chance that a choice is of each expert, float64 [W, Y, E]; the windows share part of their variance."""
    _, layers, experts = shape_WYE
    skew_Y1 = skew * np.exp(SPREAD * random.standard_normal((layers, 1)))
    shared_Y1 = _shared_part(skew_Y1, drift)
    common_YE, own_WYE = _tailed(random, (layers, experts)), _tailed(random, shape_WYE)
    log_WYE = skew_Y1 * (np.sqrt(shared_Y1) * common_YE + np.sqrt(1 - shared_Y1) * own_WYE)
    load_WYE = _shares(np.exp(log_WYE - log_WYE.max(axis=2, keepdims=True))) * experts
    return _shares(load_WYE / (1 + load_WYE / LIMIT))


def _tailed(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws of mean 0 and variance 1 whose upper tail is longer than the lower one."""
    return np.sqrt(1 - TAIL**2) * random.standard_normal(shape) + TAIL * (
        random.standard_exponential(shape) - 1
    )


def _shared_part(skew_Y1: np.ndarray, drift: float) -> np.ndarray:
    """How much of the variance of a layer's logarithms all windows have in common.

    Two log-normal loads whose logarithms differ by the standard deviation d are 2 Phi(d / 2) - 1 apart.
    """
    difference = 2 * NormalDist().inv_cdf((1 + drift) / 2)
    return np.maximum(1 - difference**2 / 2 / np.maximum(skew_Y1**2, TINY), 0)


def _shares(values_WYE: np.ndarray) -> np.ndarray:
    """Of the sum over the experts of each window and layer."""
    return values_WYE / values_WYE.sum(axis=2, keepdims=True)


# Batches
#
# A batch is counted in choices, which is tokens times experts per token. Two models of how it differs from the mean:
#
# * multinomial: every choice is independent. The least noise there can be, if nothing else varies.
# * over-dispersed: each batch has chances of its own, drawn from a Dirichlet distribution around the recorded ones
#   (together: Dirichlet-multinomial), as requests about one subject choose the same experts. The smaller the
#   concentration, the more batches differ.

BATCH_CHOICES = 4096 * 8
"""4096 tokens that choose 8 experts each."""
CONCENTRATION = 2000.0
"""Of the Dirichlet distribution of over-dispersed batches."""


def draw_batches(
    loads: Loads,
    layers: Sequence[int],
    *,
    choices: int = BATCH_CHOICES,
    batches: int = 8,
    concentration: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """counts_YBE (int64), in choices: batches for each of the given layers. The same arguments give the same batches.

    Args:
        loads: around which they are drawn; a layer's windows with a token alternate.
        layers: each needs a token in some window.
        choices: of a batch.
        batches: B of each layer.
        concentration: of over-dispersed batches; None: multinomial ones.
        seed: of all random numbers.
    """
    random = np.random.default_rng(seed)
    counts_YBE = np.empty((len(layers), batches, loads.experts), dtype=np.int64)
    for index, layer in enumerate(layers):
        tokens_BE = np.resize(loads.windows_of(layer), (batches, loads.experts))
        chance_BE = tokens_BE / tokens_BE.sum(axis=1, keepdims=True)
        if concentration is not None:
            chance_BE = random.gamma(chance_BE * concentration)
            chance_BE /= chance_BE.sum(axis=1, keepdims=True)
        counts_YBE[index] = random.multinomial(choices, chance_BE)
    return counts_YBE


# Routes


def synthetic_routes(
    tokens: int,
    experts: int,
    topk: int,
    *,
    topics: int = 16,
    strength: float = 1.5,
    skew: float = 0.6,
    seed: int = 0,
    sample: int = 0,
) -> np.ndarray:
    """topk_ids_TK (int64) of one layer, as of tokens about several topics, each of which prefers experts of its own.

    A token's experts are drawn without replacement (Gumbel top-k), by scores that are the sum of an expert's popularity
    and of what its topic prefers.

    Args:
        tokens: T.
        experts: E.
        topk: K.
        topics: what tokens may be about, all equally often.
        strength: the standard deviation of a topic's preferences; 0: experts are chosen independently.
        skew: the standard deviation of the logarithm of an expert's popularity.
        seed: of the experts' popularity and the topics' preferences.
        sample: of the tokens: another one gives other tokens of the same model.
    """
    model, random = np.random.default_rng(seed), np.random.default_rng((seed, sample))
    score_E = skew * model.standard_normal(experts)
    score_XE = score_E + strength * model.standard_normal((topics, experts))
    score_TE = score_XE[random.integers(topics, size=tokens)] + random.gumbel(size=(tokens, experts))
    return np.argsort(-score_TE, axis=1)[:, :topk]
