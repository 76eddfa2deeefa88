"""`Loads`: how many choices each expert of each layer got, in one or several recorded windows.

Loads are counted in choices, a choice being one (token, k) pair: a token that goes to K experts counts K times. The
names say tokens, as an expert sees them: each choice is a token that it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epbackend.errors import ConfigError

NUMBERING, ORIGINAL = "numbering", "original"
"""The key under which files say by whose numbers experts are counted, and its value for a checkpoint as it was
released; that of a renumbered one is its name (see `renumbering`)."""
MOST_TOKENS = 2**48
"""Of one expert in a window; the sum over a whole model then fits int64."""


@dataclass(frozen=True, eq=False)
class Loads:
    """Recorded windows of one model, e.g. a window for each workload. Read-only.

    Raises:
        ConfigError: a wrong shape, values that are no counts, or another number of names than of windows.
    """

    tokens_WYE: np.ndarray
    """Choices of each expert, float64 [windows, layers, experts], 0 or more; a dense layer is all zero."""
    names: tuple[str, ...]
    """Where each window comes from, for messages and provenance."""
    numbering: str | None = None
    """By whose numbers experts are counted: ORIGINAL, or the name of a renumbered checkpoint; None: nobody knows."""

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
    def of(
        cls,
        windows: Sequence[np.ndarray] | np.ndarray,
        names: Sequence[str] = (),
        numbering: str | None = None,
    ) -> Loads:
        """From one [Y, E] array of choices, or several of one shape; unnamed windows are called by their number."""
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
        return cls(np.array(windows), names, numbering)

    @property
    def windows(self) -> int:
        """W."""
        return self.tokens_WYE.shape[0]

    @property
    def layers(self) -> int:
        """Y: layers of the model, dense ones too."""
        return self.tokens_WYE.shape[1]

    @property
    def experts(self) -> int:
        """E."""
        return self.tokens_WYE.shape[2]

    @property
    def loaded_layers(self) -> tuple[int, ...]:
        """The layers in which any window has a choice: those that can be planned and scored."""
        return tuple(np.flatnonzero(self.tokens_WYE.any(axis=(0, 2))).tolist())

    def windows_of(self, layer: int) -> np.ndarray:
        """The choices of each expert of a layer in those windows where it has any, float64 [W, E]."""
        tokens_WE = self.tokens_WYE[:, layer]
        return tokens_WE[tokens_WE.any(axis=1)]

    def with_dense(self, dense_layers: Sequence[int]) -> Loads:
        """The loads of the whole model, where these leave out its layers without experts.

        Raises:
            ConfigError: there are no such layers in a model of so many.
        """
        every = self.layers + len(set(dense_layers))
        check_dense(dense_layers, every)
        tokens_WYE = np.zeros((self.windows, every, self.experts))
        tokens_WYE[:, [layer for layer in range(every) if layer not in dense_layers]] = self.tokens_WYE
        return Loads(tokens_WYE, self.names, self.numbering)

    def mixture_YE(self) -> np.ndarray:
        """One window in place of all, float64 [Y, E]: in each layer every window has the same weight, large or small.

        A single window is returned as it is. A layer of the mixture has the mean number of choices of its windows.
        """
        if self.windows == 1:
            return self.tokens_WYE[0]
        totals_WY1 = self.tokens_WYE.sum(axis=2, keepdims=True)
        shares_WYE = self.tokens_WYE / np.where(totals_WY1 > 0, totals_WY1, 1.0)
        present_Y1 = np.maximum((totals_WY1 > 0).sum(axis=0), 1)
        return shares_WYE.sum(axis=0) / present_Y1 * totals_WY1.mean(axis=0)


def check_dense(dense_layers: Sequence[int], layers: int) -> None:
    """Raises ConfigError for layers that the model does not have, and if they are all of its layers."""
    if beyond := [layer for layer in dense_layers if not 0 <= layer < layers]:
        raise ConfigError(
            f"dense_layers: {beyond[0]} is no layer of a model with {layers}; they are numbered from 0"
        )
    if len(set(dense_layers)) >= layers:
        raise ConfigError("dense_layers: they are all layers of the model; leave those with experts out")


def _numbers(values: object) -> np.ndarray:
    """As float64. Raises ConfigError for rows of unequal length, and for what is no number."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(
            "loads: these are not numbers in rows of equal length; give counts of tokens"
        ) from None
