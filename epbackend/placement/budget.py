"""A budget of redundant slots for all layers: which layer gets how many, and which ranks hold them."""

from __future__ import annotations

import numpy as np


def share_out(weight_YE: np.ndarray, max_replicas: int, slots: int, budget: int) -> np.ndarray:
    """Slots of each layer, int64 [Y]: `slots`, and a part of the budget by need. Layers without load get no more.

    A layer needs slots as long as its heaviest replica is heavy compared with the layer's mean load. Slots go where
    this falls most per slot. A single slot seldom lowers it where several experts are about as heavy, so the falls are
    those of its convex envelope over the number of slots. All of the budget is given, up to `max_replicas` of every
    expert.

    Args:
        weight_YE: load of each expert, in any unit.
        max_replicas: of an expert in its layer: the ranks, or a lower cap.
        slots: P of every layer before the budget.
        budget: slots to give, over all layers.
    """
    from epbackend.placement.search.layer_search import envelope_falls

    layers, experts = weight_YE.shape
    slots_Y = np.full(layers, slots)
    loaded = np.flatnonzero(weight_YE.any(axis=1))
    most = min(budget, experts * max_replicas - slots)
    if not most or not loaded.size:
        return slots_Y
    curves = (
        _heaviest_replica(weight_YE[layer] / weight_YE[layer].mean(), max_replicas, slots, most)
        for layer in loaded
    )
    fall_XY = np.stack([envelope_falls(curve_X) for curve_X in curves], axis=1)
    # Slot by slot, not layer by layer: where nothing falls any more, the rest is spread evenly.
    chosen = np.argsort(-fall_XY, axis=None, kind="stable")[:budget]
    slots_Y[loaded] += np.bincount(chosen % loaded.size, minlength=loaded.size)
    return slots_Y


def first_slots(slots_Y: np.ndarray, ranks: int) -> np.ndarray:
    """The first slot of every rank, and at the end the number of slots, int64 [Y, R + 1].

    A rank has the mean number of slots, rounded down or up. Which ranks have one more moves on round robin from layer
    to layer, so that their totals over the layers differ by one at most.
    """
    more_Y = slots_Y % ranks
    offset_Y = np.cumsum(more_Y) - more_Y
    extra_YR = (np.arange(ranks) - offset_Y[:, None]) % ranks < more_Y[:, None]
    slots_YR = slots_Y[:, None] // ranks + extra_YR
    return np.pad(np.cumsum(slots_YR, axis=1), ((0, 0), (1, 0)))


def _heaviest_replica(weight_E: np.ndarray, max_replicas: int, slots: int, most: int) -> np.ndarray:
    """The weight of the heaviest replica by slots beyond `slots`, 0 to `most`: float64 [X], X = most + 1.

    Each further replica goes to the expert whose replicas weigh most, so that the heaviest replicas are, one after
    the other, the largest of all weights / replicas; an expert with all its replicas gets no lighter.
    """
    spare = slots - weight_E.size
    replicas_C = np.arange(1, min(max_replicas, spare + most + 1) + 1)
    pieces = (weight_E[:, None] / replicas_C).ravel()
    steps = spare + most + 1
    if pieces.size > steps:
        pieces = np.partition(pieces, pieces.size - steps)[-steps:]
    return np.maximum(np.sort(pieces)[::-1][spare:], weight_E.max() / max_replicas)
