"""The token splits of every device give what `epbackend.placement.replica_split` says, to the last token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.placement import replica_split as splits
from epbackend.placement import replica_split_reference as reference
from epbackend.placement.placement import Layout

E, K = 4, 2
LAYOUT = Layout(((0, 1), (0, 3, 3), (2, 0), (3, 0, 1)), E)
"""Expert 0 is everywhere, 3 twice, and on one rank twice."""
BY_SOURCE = Layout(((0, 1, 0, 3, 3), (2, 0, 3, 0, 1)), E)
"""Two sources of two ranks each."""

batches = st.lists(st.tuples(*[st.integers(0, E - 1)] * K), min_size=1, max_size=30)


def counts(ids: list[tuple[int, ...]]) -> np.ndarray:
    return np.bincount(np.array(ids).flatten(), minlength=E)


def level_quota(
    counts_GE: np.ndarray,
    by_source: Layout,
    source: int,
    node_sources: int,
    rank_speed: tuple[float, ...] = (),
    by_node: bool = False,
) -> np.ndarray:
    if by_node:
        shares_P = reference.level_by_node_shares(counts_GE, LAYOUT, 2 * node_sources, rank_speed)
    else:
        shares_P = reference.level_shares(counts_GE.sum(axis=0), LAYOUT, rank_speed)
    return reference.own_quota(counts_GE, shares_P, by_source, source, node_sources)


@given(calls=st.lists(batches, max_size=3), offset=st.integers(0, 3))
def test_even_is_round_robin_and_advances_with_each_call(kernels, place, calls, offset):
    split = kernels.even_split(EvenReplicas(LAYOUT.slots_EC, LAYOUT.slots_EC >= 0, offset), place, None)
    for call, ids in enumerate(calls):
        quota_P = splits.even_shares(counts(ids), LAYOUT, offset + call)
        expected = splits.assign(np.array(ids), quota_P, LAYOUT)
        assert split(torch.tensor(ids, device=place)).tolist() == expected.tolist()


@given(ids=batches, rank=st.integers(0, 3))
def test_nearest_is_even_among_the_nearest_replicas(kernels, place, ids, rank):
    near_EC = LAYOUT.rank_of_slot_P[LAYOUT.slots_EC] == rank
    near_EC &= LAYOUT.slots_EC >= 0
    takes_EC = np.where(near_EC.any(axis=1, keepdims=True), near_EC, LAYOUT.slots_EC >= 0)
    split = kernels.even_split(EvenReplicas(LAYOUT.slots_EC, takes_EC, rank), place, None)
    quota_P = splits.nearest_quota(counts(ids), LAYOUT, rank)
    expected = splits.assign(np.array(ids), quota_P, LAYOUT)
    assert split(torch.tensor(ids, device=place)).tolist() == expected.tolist()


def level_of_two_sources(
    kernels, place, ids, others, source, node_sources, rank_speed, by_node=False
) -> None:
    """Compares the slots of one source with the reference's."""
    gathered = np.array([counts(ids), others])[:: 1 - 2 * source]

    def gather(counts_E: torch.Tensor) -> torch.Tensor:
        assert counts_E.tolist() == counts(ids).tolist()
        return torch.from_numpy(gathered.repeat(2, axis=0)).to(place)[::2]  # a line for each rank

    replicas = LevelReplicas(
        LAYOUT.slots_EC, LAYOUT, BY_SOURCE, source, node_sources, gather, rank_speed, by_node=by_node
    )
    found = kernels.level_split(replicas, place, None)(torch.tensor(ids, device=place))
    quota_P = level_quota(gathered, BY_SOURCE, source, node_sources, rank_speed, by_node)
    assert found.tolist() == splits.assign(np.array(ids), quota_P, LAYOUT).tolist()


@given(ids=batches, others=st.lists(st.integers(0, 50), min_size=E, max_size=E), source=st.integers(0, 1))
@pytest.mark.parametrize(("node_sources", "rank_speed"), [(0, ()), (1, (0.5, 1.0, 0.3, 1.0))])
def test_level_with_two_sources_equals_the_reference(
    kernels, place, ids, others, source, node_sources, rank_speed
):
    level_of_two_sources(kernels, place, ids, others, source, node_sources, rank_speed)


@pytest.mark.parametrize("rank_speed", [pytest.param((), marks=pytest.mark.slow), (0.5, 1.0, 0.3, 1.0)])
@pytest.mark.parametrize(
    ("others", "source"), [pytest.param([3, 1, 30, 2], 0, marks=pytest.mark.slow), ([9, 0, 0, 40], 1)]
)
def test_level_by_node_equals_the_reference(kernels, place, others, source, rank_speed):
    """A batch each: the interpreter of Triton takes seconds for one."""
    ids = np.random.default_rng(0).choice(E, (24, K), p=(0.5, 0.1, 0.1, 0.3)).tolist()
    level_of_two_sources(kernels, place, ids, others, source, 1, rank_speed, by_node=True)


@given(ids=batches)
def test_level_with_one_source_equals_the_reference(kernels, place, ids):
    alone = Layout((sum(LAYOUT.experts_of_rank, ()),), E)
    replicas = LevelReplicas(LAYOUT.slots_EC, LAYOUT, alone, 0, 0, None)
    found = kernels.level_split(replicas, place, None)(torch.tensor(ids, device=place))
    quota_P = level_quota(counts(ids)[None], alone, 0, 0)
    assert found.tolist() == splits.assign(np.array(ids), quota_P, LAYOUT).tolist()


def test_a_source_without_tokens_takes_part_in_the_gathering(kernels, place):
    asked = []

    def gather(counts_E: torch.Tensor) -> torch.Tensor:
        asked.append(counts_E.tolist())
        return counts_E.expand(2, -1)

    replicas = LevelReplicas(LAYOUT.slots_EC, LAYOUT, BY_SOURCE, 0, 0, gather)
    none_TK = torch.empty(0, K, dtype=torch.int64, device=place)
    assert kernels.level_split(replicas, place, None)(none_TK).shape == (0, K)
    assert asked == [[0] * E]


@pytest.mark.parametrize("replicas", ["one", "even", "level"])
@pytest.mark.parametrize("outside", [-1, E, 1 << 40])
def test_ids_out_of_range_get_existing_slots_and_are_raised(kernels, place, replicas, outside):
    """At once on a CPU, on other devices in a later call."""
    slot_ids_EC = LAYOUT.slots_EC[:, :1] if replicas == "one" else LAYOUT.slots_EC
    id_check = ExpertIdCheck(E, place, layer=7)
    if replicas == "level":
        alone = Layout((sum(LAYOUT.experts_of_rank, ()),), E)
        tables = LevelReplicas(slot_ids_EC, LAYOUT, alone, 0, 0, None)
        make = kernels.level_split
    else:
        tables, make = EvenReplicas(slot_ids_EC, slot_ids_EC >= 0), kernels.even_split
    ids_TK = torch.tensor([[0, outside], [2, 3]], device=place)
    unchecked = make(tables, place, None)(ids_TK)
    assert 0 <= int(unchecked.min()) <= int(unchecked.max()) < LAYOUT.slots
    split = make(tables, place, id_check)
    with pytest.raises(
        ConfigError, match=f"layer 7: a token chose expert {outside}, and the experts are 0 to 3;"
    ):
        call_twice(split, ids_TK)


def call_twice(split: Split, ids_TK: torch.Tensor) -> None:
    split(ids_TK)
    torch.get_device_module(ids_TK.device).synchronize()
    split(ids_TK)


def test_strided_expert_ids_get_the_same_slots(kernels, place):
    wide = torch.tensor([[0, 3], [2, 1], [0, 0], [3, 3]], device=place)
    even = EvenReplicas(LAYOUT.slots_EC, LAYOUT.slots_EC >= 0, 0)
    alone = Layout((sum(LAYOUT.experts_of_rank, ()),), E)
    level = LevelReplicas(LAYOUT.slots_EC, LAYOUT, alone, 0, 0, None)
    for make, replicas in ((kernels.even_split, even), (kernels.level_split, level)):
        column, same = wide[:, :1], wide[:, :1].clone(memory_format=torch.contiguous_format)
        assert make(replicas, place, None)(column).tolist() == make(replicas, place, None)(same).tolist()
