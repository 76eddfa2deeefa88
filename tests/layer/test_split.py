"""The splits on tensors give what `epbackend.placement.replica_split` says, to the last token."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.errors import ConfigError
from epbackend.kernels.cpu.kernels import CpuKernels
from epbackend.placement import replica_split as on_arrays
from epbackend.placement.placement import Layout
from epbackend.replica_split import SlotMap, TokenSplit

E, K = 5, 3


def spec(rank: int, size: int, token_size: int = 1) -> LayerSpec:
    ranks = RankGroup(None, rank, size, token_size=token_size)
    return LayerSpec(ranks, get_device("cpu"), CpuKernels(), DispatchSettings(), slots=0, top_k=K)


@st.composite
def layouts(draw) -> Layout:
    """Up to four ranks with unequal slots; experts may be on a rank twice."""
    ranks = draw(st.sampled_from([1, 2, 4]))
    more = draw(st.lists(st.integers(0, E - 1), max_size=8))
    slots = draw(st.permutations([*range(E), *more]))
    cuts = sorted(draw(st.sets(st.integers(1, len(slots) - 1), min_size=ranks - 1, max_size=ranks - 1)))
    bounds = [0, *cuts, len(slots)]
    held = tuple(tuple(slots[first:last]) for first, last in pairwise(bounds))
    return Layout(held, E)


def chosen(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, E, (tokens, K), generator=torch.Generator().manual_seed(seed))


def expected_slots(ids_TK: torch.Tensor, quota_P: np.ndarray, slot_map: SlotMap) -> torch.Tensor:
    """`placement.split.assign`, in the ids of the slot map."""
    slots_TK = on_arrays.assign(ids_TK.numpy(), quota_P, slot_map.layout)
    ids_P = np.empty(slot_map.layout.slots, dtype=np.int64)
    there = slot_map.layout.slots_EC >= 0
    ids_P[slot_map.layout.slots_EC[there]] = slot_map.slot_ids_EC[there]
    return torch.from_numpy(ids_P[slots_TK])


@settings(max_examples=40)
@given(layout=layouts(), tokens=st.integers(0, 40), seed=st.integers(0, 99), rank=st.integers(0, 3))
def test_even_takes_turns_from_call_to_call(layout, tokens, seed, rank):
    rank, slot_map = rank % layout.ranks, SlotMap(layout)
    split = TokenSplit("even", slot_map, spec(rank, layout.ranks))
    for call in range(3):
        ids = chosen(tokens, seed + call)
        counts = np.bincount(ids.flatten(), minlength=E)
        quota = on_arrays.even_shares(counts, layout, offset=rank + call)
        assert torch.equal(split(ids), expected_slots(ids, quota, slot_map))


@settings(max_examples=40)
@given(layout=layouts(), tokens=st.integers(0, 40), rank=st.integers(0, 3), node=st.sampled_from([0, 1, 2]))
def test_nearest_takes_the_nearest_replicas(layout, tokens, rank, node):
    rank, slot_map = rank % layout.ranks, SlotMap(layout, node)
    ids = chosen(tokens, seed=0)
    quota = on_arrays.nearest_quota(np.bincount(ids.flatten(), minlength=E), layout, rank, node)
    split = TokenSplit("nearest", slot_map, spec(rank, layout.ranks))
    assert torch.equal(split(ids), expected_slots(ids, quota, slot_map))


@settings(max_examples=40)
@given(layout=layouts(), tokens=st.integers(0, 40), rank=st.integers(0, 3))
def test_level_where_all_ranks_hold_the_same_tokens(layout, tokens, rank):
    """No other rank is asked: there is no process group here."""
    slot_map, ids = SlotMap(layout), chosen(tokens, seed=1)
    quota = on_arrays.level_shares(np.bincount(ids.flatten(), minlength=E), layout)
    split = TokenSplit("level", slot_map, spec(rank % layout.ranks, layout.ranks, layout.ranks))
    assert torch.equal(split(ids), expected_slots(ids, quota, slot_map))


def level_of_all(
    groups, name: str, layout: Layout, token_size: int, tokens: tuple[int, ...], node_size: int
) -> bool:
    """Whether this rank's split is the one of the gathered counts."""
    ranks = groups[token_size]
    slot_map = SlotMap(layout, node_size)
    chosen_by_source = [chosen(count, seed) for seed, count in enumerate(tokens)]
    counts = np.array([np.bincount(ids.flatten(), minlength=E) for ids in chosen_by_source])
    held = layout.experts_of_rank
    grouped = [sum(held[first : first + token_size], ()) for first in range(0, len(held), token_size)]
    if name == "level":
        shares = on_arrays.level_shares(counts.sum(axis=0), layout)
    else:  # ranks of one source are one node at least
        shares = on_arrays.level_by_node_shares(counts, layout, max(node_size or layout.ranks, token_size))
    node = node_size // token_size
    quota = on_arrays.own_quota(counts, shares, Layout(tuple(grouped), E), ranks.source, node)
    ids = chosen_by_source[ranks.source]
    found = TokenSplit(
        name, slot_map, LayerSpec(ranks, get_device("cpu"), CpuKernels(), DispatchSettings(), 0, K)
    )(ids)
    return torch.equal(found, expected_slots(ids, quota, slot_map))


@pytest.mark.parametrize(
    ("name", "token_size", "node_size"),
    [
        *[("level", token_size, node_size) for token_size in (1, 2) for node_size in (0, 2)],
        ("level_by_node", 1, 2),
        ("level_by_node", 2, 2),
        ("level_by_node", 2, 1),
        ("level_by_node", 1, 0),
    ],
)
def test_the_levelling_splits_ask_the_other_sources(ranks, name, token_size, node_size):
    layout = Layout(((0, 1, 2), (3, 4), (0, 0, 3, 1), (2, 0)), E)
    tokens = (20, 0, 3, 11)[: 4 // token_size]
    assert ranks.run(4, level_of_all, name, layout, token_size, tokens, node_size) == [True] * 4


@pytest.mark.parametrize("name", on_arrays.SPLITS)
def test_without_replicas_there_is_nothing_to_split(name):
    """Not even the other ranks are asked."""
    slot_map = SlotMap(Layout(((4, 1), (0, 2, 3)), E))
    ids = torch.tensor([[0, 4, 3]])
    assert TokenSplit(name, slot_map, spec(0, 2))(ids).tolist() == [[3, 0, 5]]


def test_an_unknown_split_raises():
    replicas = SlotMap.of((0, 1, 0, 1), 2)
    with pytest.raises(
        ConfigError, match="split 'random' is unknown; it is one of even, nearest, level, level_by_node"
    ):
        TokenSplit("random", replicas, spec(0, 2))


@pytest.mark.parametrize("name", on_arrays.SPLITS)
def test_an_id_of_no_expert_raises_where_ids_are_checked(name):
    """Where ids are not checked, a choice of it goes where an expert is."""
    slot_map, ids = SlotMap.of((0, 1, 0, 1), 2), torch.tensor([[0, 5]])
    with pytest.raises(ConfigError, match="layer 0: a token chose expert 5, and the experts are 0 to 1;"):
        TokenSplit(name, slot_map, spec(0, 2, 2))(ids)
    assert int(TokenSplit(name, slot_map, spec(0, 2, 2), check_ids=False)(ids).max()) < 4


@pytest.mark.parametrize("name", on_arrays.SPLITS)
def test_an_id_of_no_expert_is_that_of_the_call(name):
    split = TokenSplit(name, SlotMap.of((0, 1, 0, 1), 2), spec(0, 2, 2))
    for wrong in (99, 70, -3):
        with pytest.raises(ConfigError, match=f"a token chose expert {wrong}, and"):
            split(torch.tensor([[0, wrong]]))
        split(torch.tensor([[0, 1]]))


def token_groups(groups) -> list[str]:
    """What this rank of four is told of groups of ranks that hold the same tokens."""
    rank, said = groups[1].rank, []
    for parts in ([[0, 2], [1, 3]], [[0], [1, 2], [3]], [[0, 1, 2], [3]], [[0, 1], [2, 3]]):
        mine = [dist.new_group(part) for part in parts]
        here = next(at for at, part in enumerate(parts) if rank in part)
        try:
            place = RankGroup.of(groups[1].group, mine[here])
            said.append(f"source {place.source} of {place.sources}")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_ranks_with_the_same_tokens_follow_each_other(ranks):
    """Others would get answers to the tokens of their neighbours."""
    apart, across, uneven, right = zip(*ranks.run(4, token_groups), strict=True)
    assert [re.search(r"places (\[.*?\])", said)[1] for said in apart] == ["[0, 2]", "[1, 3]"] * 2
    assert re.search(r"token_group: its ranks have the places \[1, 2\] in `group`, which has 4", across[1])
    assert "[0, 1, 2]" in uneven[0]
    assert right == ("source 0 of 2", "source 0 of 2", "source 1 of 2", "source 1 of 2")


def test_numba_is_imported_for_level_only():
    """numba takes half a second to import, in every rank."""
    script = (
        "import sys, torch\n"
        "from epbackend.dispatch.base import RankGroup\n"
        "from epbackend.dispatch.base import DispatchSettings\n"
        "from epbackend.moe import ExpertParallelMoE\n"
        "from epbackend.replica_split import SlotMap\n"
        "for split in ('nearest', 'level'):\n"
        "    layer = ExpertParallelMoE(torch.ones(3, 4, 2), torch.ones(3, 2, 2), slot_map=SlotMap.of((0, 1, 0), 1),\n"
        "        ranks=RankGroup.single(), settings=DispatchSettings(), top_k=1, split=split)\n"
        "    layer(torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))\n"
        "    print(split, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["nearest False", "level True"]
