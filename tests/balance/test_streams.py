"""In which order a device is asked for what staging and flips need, with one that only writes down what it is asked."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from epbackend.balance import streams as module
from epbackend.balance.streams import AHEAD, Streams

pytestmark = pytest.mark.cpu


@dataclass
class Device:
    """As torch.cuda; what it computes lies on `meta`."""

    said: list[tuple] = field(default_factory=list)
    current: str = "serving"

    def Event(self):
        return Event(self)

    def Stream(self):
        return Stream(self)

    @contextmanager
    def device(self, place):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, "beside"
        yield
        self.current = before


@dataclass(eq=False)
class Event:
    device: Device
    number: int = 0

    def record(self):
        self.number = sum(what == "mark" for what, *_ in self.device.said)
        self.device.said.append(("mark", self.number, self.device.current))

    def synchronize(self):
        self.device.said.append(("the host waits for mark", self.number))


@dataclass(eq=False)
class Stream:
    device: Device

    def wait_event(self, event):
        self.device.said.append(("beside waits for mark", event.number))

    def synchronize(self):
        self.device.said.append(("the host waits for beside",))


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    monkeypatch.setattr(module, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    return device


def test_no_step_begins_before_the_one_four_back_is_done(device):
    streams = Streams(torch.device("meta"))
    for _ in range(AHEAD + 2):
        streams.begin_step()
    marks = [("mark", number, "serving") for number in range(AHEAD + 2)]
    waits = [("the host waits for mark", number) for number in range(3)]
    assert device.said == [
        *marks[:AHEAD],
        waits[0],
        *(each for pair in zip(marks[AHEAD:], waits[1:], strict=True) for each in pair),
    ]
    assert streams.lead == AHEAD


def test_staging_waits_for_the_flip_before_it_and_the_flip_for_what_is_staged(device):
    """Its memory is read by one flip and written for the next one."""
    streams = Streams(torch.device("meta"))
    streams.reserve(48, 64)  # mark 0: what the memory held before, and weights that are still being loaded
    for flip in range(2):
        with streams.beside():
            device.said.append(("staged", device.current))
            near = streams.brought(
                {3: torch.zeros(16, dtype=torch.uint8), 1: torch.ones(8, dtype=torch.uint8)}
            )
        device.said.append(("flip", device.current))
        streams.flipped()
        assert device.said[-5:] == [
            ("beside waits for mark", flip),
            ("staged", "beside"),
            ("the host waits for beside",),
            ("flip", "serving"),
            ("mark", flip + 1, "serving"),
        ]
        assert {place: len(part) for place, part in near.items()} == {3: 16, 1: 8}
        assert {part.device.type for part in near.values()} == {"meta"}


def test_messages_lie_in_one_piece_of_memory_until_one_of_them_may_come_late(device):
    streams = Streams(torch.device("meta"))
    streams.reserve(48, 64)
    first, again = streams.messages([40, 8]), streams.messages([16])
    assert [len(each) for each in (*first, *again)] == [40, 8, 16]
    assert first[0].data_ptr() == again[0].data_ptr()
    streams.discard()
    assert streams.messages([16])[0].data_ptr() != again[0].data_ptr()


def test_a_host_without_memory_fails_the_next_migration_and_not_the_one_that_is_given_up(device, monkeypatch):
    """The thread that gives it up has still to answer for it."""
    streams = Streams(torch.device("meta"))
    streams.reserve(48, 64)

    def none_left(size):
        raise RuntimeError("no memory")

    with monkeypatch.context() as full:
        full.setattr(module, "_pinned", none_left)
        streams.discard()
        with pytest.raises(RuntimeError, match="no memory"):
            streams.messages([16])
    assert [len(each) for each in streams.messages([40, 24])] == [40, 24]


def test_on_a_cpu_nothing_is_reserved_or_waited_for():
    streams = Streams(torch.device("cpu"))
    streams.reserve(1 << 60, 1 << 60)
    streams.begin_step()
    expert = torch.zeros(8, dtype=torch.uint8)
    with streams.beside():
        assert streams.brought({0: expert})[0] is expert
    assert [len(each) for each in streams.messages([3, 5])] == [3, 5]
    assert streams.lead == 1
