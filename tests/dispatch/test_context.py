"""Who owns what layers share on a process group: made once, closed by its owner, and no collective in a predicate."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from epbackend.device import get_device
from epbackend.dispatch import choose as choosing
from epbackend.dispatch import watchdog
from epbackend.dispatch.base import Dispatcher, DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.deepep import BufferLink
from epbackend.dispatch.watchdog import Watchdog
from epbackend.errors import EPError
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers import deep_ep_stand_in
from tests.helpers.patience import PATIENCE_S

closed: list[str] = []


@dataclass
class Thing:
    name: str

    def close(self) -> None:
        closed.append(self.name)
        if self.name == "broken":
            raise RuntimeError("it does not close")


@pytest.fixture(autouse=True)
def _nothing_closed():
    closed.clear()


def test_each_thing_is_made_once_and_the_last_is_closed_first():
    with GroupContext() as context:
        first = context.get(Thing, "first")
        context.get(Thing, "second")
        assert context.get(Thing, "first") is first
        assert context.get(str.upper, "an answer") == "AN ANSWER"  # needs no closing
    context.close()
    assert closed == ["second", "first"]


def test_all_are_closed_even_if_one_fails():
    context = GroupContext()
    for name in ("first", "broken", "last"):
        context.get(Thing, name)
    with pytest.raises(RuntimeError, match="does not close"):
        context.close()
    assert closed == ["last", "broken", "first"]


def test_a_closed_context_makes_nothing():
    context = GroupContext()
    context.close()
    with pytest.raises(EPError, match="is closed: make another one"):
        context.get(Thing, "first")


def test_a_context_that_is_dropped_closes_its_things():
    context = GroupContext()
    context.get(Thing, "first")
    del context
    gc.collect()
    assert closed == ["first"]


def layer(ranks: RankGroup, context: GroupContext | None = None, **settings) -> ExpertParallelMoE:
    slots = 4 // ranks.size
    return ExpertParallelMoE(
        torch.randn(slots, 8, 6),
        torch.randn(slots, 6, 4),
        slot_map=SlotMap.uniform(4, ranks.size),
        ranks=ranks,
        settings=DispatchSettings(**settings),
        top_k=2,
        layer=7,
        context=context,
    )


TOKENS = torch.randn(3, 6), torch.tensor([[0, 3]] * 3), torch.rand(3, 2)


def test_a_layer_closes_its_own_context_only():
    with GroupContext() as shared:
        with layer(RankGroup.single()) as own, layer(RankGroup.single(), shared) as sharing:
            assert own(*TOKENS).shape == sharing(*TOKENS).shape == (3, 6)
        assert (own.context.closed, shared.closed) == (True, False)
    for each in (own, sharing):
        with pytest.raises(EPError, match="MoE layer 7 is closed"):
            each(*TOKENS)


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "epbackend watchdog"]


def test_the_thread_of_a_dropped_context_ends(monkeypatch):
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    assert not watchdogs(), "of another test"
    context = GroupContext()
    context.get(Watchdog.of, "a group").add("layer 1", lambda: False, 60)
    assert len(watchdogs()) == 1
    del context
    gc.collect()
    deadline = time.monotonic() + PATIENCE_S
    while watchdogs() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not watchdogs()


def groups_come_and_go(_: dict[int, RankGroup]) -> None:
    """Three groups, one after the other, each with two layers on one context: calls, a watchdog, DeepEP's buffer."""
    deep_ep_stand_in.install()
    for _ in range(3):
        group = dist.new_group([0, 1])
        ranks, context = RankGroup.of(group), GroupContext()
        layers = [layer(ranks, context, level=level) for level in (1, 2)]
        for each in layers:
            each(*TOKENS)
        dog = context.get(Watchdog.of, group)
        dog.add("layer 7", lambda: False, 60)
        link = context.get(BufferLink, group)
        held = [weakref.ref(each) for each in (context, dog, link, link.open(6), group, *layers)]
        del dog, link
        context.close()
        assert not watchdogs()
        assert held[3]() is None, "DeepEP's buffer"
        dist.destroy_process_group(group)
        del group, ranks, context, layers, each
        gc.collect()
        assert [ref() for ref in held] == [None] * len(held)


def test_nothing_is_left_of_groups_that_were_closed_and_destroyed(ranks):
    ranks.run(2, groups_come_and_go)


class Asking(Dispatcher):
    """A dispatcher whose ranks find out together that it cannot serve."""

    name = "asking"
    level = 2
    summary = ""

    @classmethod
    def agree(cls, spec: LayerSpec) -> str | None:
        return spec.context.get(cls._ask, spec.ranks)

    @classmethod
    def _ask(cls, ranks: RankGroup) -> str | None:
        ranks_R = Collectives(ranks.group, 10.0, 0).all_gather(torch.tensor([ranks.rank])).tolist()
        return f"ranks {ranks_R} said no"

    def begin(self, hidden_TD, slot_ids_TK, weights_TK):
        raise NotImplementedError


def collectives_of_a_choice(groups: dict[int, RankGroup]) -> tuple[list[str], list[str], str, str]:
    """Collectives of all predicates, of choosing for two layers, what was taken, and the reason against `Asking`."""
    cpu, called, start = get_device("cpu"), [], Collectives._start

    def spy(self, name, *args, **options):
        called.append(name)
        return start(self, name, *args, **options)

    spec = LayerSpec(groups[1], cpu, cpu.kernels, DispatchSettings(level=2), slots=2, top_k=2)
    classes, broken = choosing._classes()
    table = {Asking.name: Asking, **classes}, broken
    with (
        mock.patch.object(Collectives, "_start", spy),
        mock.patch.object(choosing, "_classes", return_value=table),
    ):
        for cls in table[0].values():
            cls.unsupported(spec)
        choosing.decide(spec)
        of_predicates = list(called)
        _, first = choosing.choose(spec)
        _, second = choosing.choose(spec)
    assert first == second
    return of_predicates, called, first.name, dict(first.passed_over)["asking"]


def test_ranks_agree_once_and_predicates_make_no_collective(ranks):
    for seen in ranks.run(2, collectives_of_a_choice):
        assert seen == ([], ["all_gather"], "alltoall", "ranks [0, 1] said no")
