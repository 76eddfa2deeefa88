"""One budget of redundant slots for all layers: which layer gets how many, and which ranks hold them."""

from __future__ import annotations

import numpy as np


def share_out(weight_LE: np.ndarray, ranks: int, slots: int, budget: int) -> np.ndarray:
    """Slots of each layer, int64 [L]: `slots`, and a part of the budget by need. Layers without load get no more.

    A layer needs slots as long as its heaviest copy is heavy compared with the layer's mean rank load. The slots go
    where this falls most a slot. One slot seldom lowers it where several experts are about as heavy, so the falls are
    those of its convex envelope over the number of slots. All of the budget is given, up to a copy of every expert on
    every rank.
    """
    from epbackend.placement.search.layer_search import falls

    layers, experts = weight_LE.shape
    slots_L = np.full(layers, slots)
    loaded = np.flatnonzero(weight_LE.any(axis=1))
    most = min(budget, experts * ranks - slots)
    if not most or not loaded.size:
        return slots_L
    curves = (
        _heaviest_copy(weight_LE[layer] / weight_LE[layer].mean(), ranks, slots, most) for layer in loaded
    )
    fall_XL = np.stack([falls(curve_X) for curve_X in curves], axis=1)
    # Slot by slot, not layer by layer: where nothing falls any more, the rest is spread evenly.
    chosen = np.argsort(-fall_XL, axis=None, kind="stable")[:budget]
    slots_L[loaded] += np.bincount(chosen % loaded.size, minlength=loaded.size)
    return slots_L


def first_slots(slots_L: np.ndarray, ranks: int) -> np.ndarray:
    """The first slot of every rank, and behind the last rank all slots, int64 [L, R + 1].

    A rank has the mean number of slots, rounded down or up. The turn to have one more goes around the ranks from layer
    to layer, so that their totals over the layers differ by one at most.
    """
    more_L = slots_L % ranks
    turn_L = np.cumsum(more_L) - more_L
    extra_LR = (np.arange(ranks) - turn_L[:, None]) % ranks < more_L[:, None]
    slots_LR = slots_L[:, None] // ranks + extra_LR
    return np.pad(np.cumsum(slots_LR, axis=1), ((0, 0), (1, 0)))


def _heaviest_copy(weight_E: np.ndarray, ranks: int, slots: int, most: int) -> np.ndarray:
    """The weight of the heaviest copy by redundant slots beyond `slots`, 0 to `most`.

    Each further copy goes to the expert whose copies weigh most, so that the heaviest copies are, one after the other,
    the largest of all weights / copies; an expert on all ranks gets no lighter.
    """
    spare = slots - weight_E.size
    copies_C = np.arange(1, min(ranks, spare + most + 1) + 1)
    pieces = (weight_E[:, None] / copies_C).ravel()
    steps = spare + most + 1
    if pieces.size > steps:
        pieces = np.partition(pieces, pieces.size - steps)[-steps:]
    return np.maximum(np.sort(pieces)[::-1][spare:], weight_E.max() / ranks)
