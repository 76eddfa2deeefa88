"""What is in a picture, read back from its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

NEARLY_WHITE = 0.95


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    height, width = _pixels(path).shape[:2]
    return width, height


def drawn_share(
    path: Path, left: float = 0.0, right: float = 1.0, top: float = 0.0, bottom: float = 1.0
) -> float:
    """The share of pixels that are not (nearly) white in a part of the picture, whose edges are shares of the whole."""
    return float((_part(path, left, right, top, bottom).min(axis=2) < NEARLY_WHITE).mean())


def colour_share(
    path: Path,
    colour: str,
    left: float = 0.0,
    right: float = 1.0,
    top: float = 0.0,
    bottom: float = 1.0,
) -> float:
    """The share of pixels of exactly this colour, `#RRGGBB`, in a part of the picture."""
    from matplotlib.colors import to_rgb

    off_YXC = np.abs(_part(path, left, right, top, bottom) - to_rgb(colour))
    return float((off_YXC.max(axis=2) < 0.5 / 255).mean())


def _part(path: Path, left: float, right: float, top: float, bottom: float) -> np.ndarray:
    pixels_YXC = _pixels(path)
    height, width = pixels_YXC.shape[:2]
    return pixels_YXC[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]


def _pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.suffix == ".png"
    return imread(path)[:, :, :3]
