"""A rank's device beside its host: how far the host runs ahead, and the stream on which experts are staged.

On a CPU there is neither: a call is over when it returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AHEAD = 4
"""Steps that the host of a rank may be ahead of its device. Engines stay below: they wait for the tokens."""


class Streams:
    """Of one rank. `begin_step` and `flipped` belong to the thread that serves, `beside` to the one that stages."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._module: Any = None if place.type == "cpu" else torch.get_device_module(place.type)
        self.lead = 1 if self._module is None else AHEAD
        """No step k + lead begins here before step k is done."""
        self._ends: deque[Any] = deque()
        self._stream: Any = None
        self._flip: Any = None

    def begin_step(self) -> None:
        """Wait until the device has done all but the last steps, as it nearly always has."""
        if self._module is None:
            return
        # Behind the step before this one, in whose stream we are.
        self._ends.append(self._marked())
        if len(self._ends) == self.lead:
            self._ends.popleft().synchronize()

    def flipped(self) -> None:
        """What the current stream has been given so far changes experts: `beside` comes after it."""
        if self._module is not None:
            self._flip = self._marked()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, the device works for this thread on a stream of its own; it is done when the block is left."""
        if self._module is None:
            yield
            return
        with self._module.device(self._place):
            if self._stream is None:
                self._stream = self._module.Stream()
            if self._flip is not None:
                # The flip before has read what was staged, memory that is now used again, and written what is now read.
                self._stream.wait_event(self._flip)
            with self._module.stream(self._stream):
                yield
            self._stream.synchronize()

    def brought(self, experts: dict[int, Tensor]) -> dict[int, Tensor]:
        """The same bytes at the device, so that a flip copies within its memory."""
        return {place: expert.to(self._place) for place, expert in experts.items()}

    def _marked(self) -> Any:
        mark = self._module.Event()
        mark.record()
        return mark
