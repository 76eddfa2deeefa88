"""A rank's device beside its host: how far the host runs ahead, and with which stream and memory experts are staged.

On a CPU there is none of it: a call is over when it returns, and what is staged lies where a flip reads it.
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
    """Of one rank. `reserve`, `begin_step` and `flipped` belong to the thread that serves, the rest to the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device.type)
        self.lead = 1 if self._module is None else AHEAD
        """No step k + lead begins here before step k is done."""
        self._ends: deque[Any] = deque()
        self._stream: Any = None
        self._flip: Any = None
        self._near: Tensor | None = None
        self._host: Tensor | None = None
        self._host_bytes = 0

    @torch.inference_mode(False)
    def reserve(self, experts_bytes: int, messages_bytes: int) -> None:
        """Take memory for so many bytes of experts at the device, and for their messages on the host, pinned.

        Once, by the thread that serves, before the engine gives the rest of the device's memory to its cache; later the
        device might have none, or wait while it is taken. Not on a CPU: there a migration takes what it needs, and
        gives it back.
        """
        # Models are loaded in inference mode, whose tensors could not be changed outside of it.
        if self._module is None:
            return
        if self._near is None or len(self._near) < experts_bytes:
            self._near = torch.empty(experts_bytes, dtype=torch.uint8, device=self._device)
        if self._host_bytes < messages_bytes:
            self._host, self._host_bytes = _pinned(messages_bytes), messages_bytes
        # What the stream has been given so far may still use that memory, or load experts that are to be sent.
        self._flip = self._marked()

    def messages(self, sizes: list[int]) -> list[Tensor]:
        """Memory of the host for messages of so many bytes; on a device the same for every migration.

        Raises:
            RuntimeError: it was discarded, and the host has no other.
        """
        if self._module is None:
            return [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
        if self._host is None:
            self._host = _pinned(self._host_bytes)
        return list(self._host[: sum(sizes)].split(sizes))

    def discard(self) -> None:
        """Never again use the memory of messages, into which one may still come. The next migration takes other."""
        self._host = None

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
        with self._module.device(self._device):
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
        if self._near is None:
            return experts
        sizes = [len(expert) for expert in experts.values()]
        parts = self._near[: sum(sizes)].split(sizes)
        return {place: part.copy_(experts[place]) for place, part in zip(experts, parts, strict=True)}

    def _marked(self) -> Any:
        mark = self._module.Event()
        mark.record()
        return mark


def _pinned(size: int) -> Tensor:
    """Memory of the host that a device reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
