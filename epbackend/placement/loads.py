"""`Loads`: how many tokens each expert of each layer got, in one or several recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epbackend.errors import ConfigError

MOST_TOKENS = 2**48
"""Of an expert in a window; the tokens of a whole model then fit int64."""


@dataclass(frozen=True, eq=False)
class Loads:
    """Recorded windows of the same model, e.g. one a workload. Read-only.

    Raises ConfigError for a wrong shape, for values that are no counts, and for names that do not match.
    """

    tokens_WYE: np.ndarray
    """Tokens of each expert, float64 [windows, layers, experts]; a dense layer is all zero."""
    names: tuple[str, ...]
    """Where each window comes from, for messages and provenance."""

    def __post_init__(self) -> None:
        tokens_WYE = _numbers(self.tokens_WYE).copy()
        if tokens_WYE.ndim != 3 or 0 in tokens_WYE.shape:
            raise ConfigError(
                f"loads: must be [windows, layers, experts], none of them 0, but the shape is {tokens_WYE.shape}"
            )
        if len(self.names) != len(tokens_WYE):
            raise ConfigError(f"loads: {len(tokens_WYE)} windows have {len(self.names)} names; give each one")
        for bad, what in (
            (~np.isfinite(tokens_WYE), "not a finite number"),
            (tokens_WYE < 0, "negative"),
            (tokens_WYE > MOST_TOKENS, "too large"),
        ):
            if bad.any():
                window, layer, expert = np.argwhere(bad)[0]
                raise ConfigError(
                    f"loads: expert {expert} of layer {layer} in {self.names[window]} is {what}; counts of tokens "
                    f"are from 0 to {MOST_TOKENS}"
                )
        tokens_WYE.flags.writeable = False
        object.__setattr__(self, "tokens_WYE", tokens_WYE)

    @classmethod
    def of(cls, windows: Sequence[np.ndarray] | np.ndarray, names: Sequence[str] = ()) -> Loads:
        """From one [Y, E] array, or several of the same shape; unnamed windows are called by their number."""
        windows = [windows] if isinstance(windows, np.ndarray) and windows.ndim == 2 else list(windows)
        names = tuple(names) or tuple(f"window {index}" for index in range(len(windows)))
        windows = [_numbers(window) for window in windows]
        shapes = [window.shape for window in windows]
        for name, shape in zip(names, shapes, strict=False):
            if shape != shapes[0]:
                raise ConfigError(
                    f"loads: {name} has the shape {shape}, {names[0]} has {shapes[0]}; "
                    "record all windows with the same model"
                )
        return cls(np.array(windows), names)

    @property
    def windows(self) -> int:
        """W."""
        return self.tokens_WYE.shape[0]

    @property
    def layers(self) -> int:
        """Layers of the model, dense ones too."""
        return self.tokens_WYE.shape[1]

    @property
    def experts(self) -> int:
        """E."""
        return self.tokens_WYE.shape[2]

    @property
    def loaded_layers(self) -> tuple[int, ...]:
        """The layers in which any window has a token: those that can be planned and judged."""
        return tuple(np.flatnonzero(self.tokens_WYE.any(axis=(0, 2))).tolist())

    def mixture_YE(self) -> np.ndarray:
        """One window for all: in each layer every window counts equally, whatever its number of tokens.

        A single window comes back as it is. The mixture has the mean number of tokens of the windows.
        """
        if self.windows == 1:
            return self.tokens_WYE[0]
        totals_WY1 = self.tokens_WYE.sum(axis=2, keepdims=True)
        shares_WYE = self.tokens_WYE / np.where(totals_WY1 > 0, totals_WY1, 1.0)
        present_Y1 = np.maximum((totals_WY1 > 0).sum(axis=0), 1)
        return shares_WYE.sum(axis=0) / present_Y1 * totals_WY1.mean(axis=0)


def _numbers(values: object) -> np.ndarray:
    """As float64. Raises ConfigError for ragged rows, and for what is no number."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(
            "loads: these are not numbers in rows of equal length; give counts of tokens"
        ) from None
