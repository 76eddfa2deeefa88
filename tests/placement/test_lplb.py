"""LPLB's placement: EPLB without replicas, then replicas along a graph."""

from __future__ import annotations

import numpy as np
import pytest

from epbackend.errors import ConfigError
from epbackend.placement import Layout, plan
from epbackend.placement.planners.lplb import TOPOLOGIES, topology_matrix
from tests.helpers.placement_strategies import skewed


def lplb(loads_YE, ranks, slots, **options):
    return plan(loads_YE, ranks=ranks, slots=slots, algorithm="lplb", **options)


def test_the_published_cube():
    assert topology_matrix("cube", 8, 0, 2).T.tolist() == [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]


@pytest.mark.parametrize("ranks", [2, 3, 32])
def test_spread_is_one_circle_through_all_ranks_for_each_column(ranks):
    r2o_ZJ = topology_matrix("spread", ranks, 0, ranks - 1)
    for source_Z in r2o_ZJ.T:
        seen, rank = [], 0
        for _ in range(ranks):
            seen.append(rank)
            rank = int(source_Z[rank])
        assert rank == 0
        assert sorted(seen) == list(range(ranks))
    assert np.array_equal(r2o_ZJ, topology_matrix("spread", ranks, 0, ranks - 1))


def test_a_ring_looks_one_rank_back_and_then_two():
    assert topology_matrix("ring", 5, 0, 2).T.tolist() == [[4, 0, 1, 2, 3], [3, 4, 0, 1, 2]]


def test_a_hypercube_joins_ranks_that_differ_in_one_bit_and_each_pair_once():
    r2o_ZJ = topology_matrix("hypercube", 16, 0, 2)
    edges = {frozenset((rank, int(source))) for rank in range(16) for source in r2o_ZJ[rank]}
    assert len(edges) == 32
    assert all(bin(a ^ b).count("1") == 1 for a, b in map(tuple, edges))


def test_a_torus_joins_neighbours_in_the_node_and_on_the_next_node():
    r2o_RJ = topology_matrix("torus", 12, 4, 2)
    assert r2o_RJ[:4].tolist() == [[3, 8], [0, 9], [1, 10], [2, 11]]
    assert r2o_RJ[4:8].tolist() == [[7, 0], [4, 1], [5, 2], [6, 3]]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_redundant_slots_copy_what_the_matrix_says(topology):
    loads_YE = skewed(3, 64)
    for layer, load_E in zip(
        lplb(loads_YE, 16, 96, topology=topology, node_size=4).layers, loads_YE, strict=True
    ):
        own_RL = np.array(layer.experts_of_rank)[:, :4]
        assert sorted(own_RL.ravel()) == list(range(64))
        assert (np.diff(load_E[own_RL], axis=1) <= 0).all()
        r2o_RJ = topology_matrix(topology, 16, 4, 2)
        if len(r2o_RJ) == 8:
            r2o_RJ = np.concatenate([r2o_RJ, r2o_RJ + 8])
        for rank, held in enumerate(layer.experts_of_rank):
            assert held[4:] == (own_RL[r2o_RJ[rank, 0], 0], own_RL[r2o_RJ[rank, 1], 1])
        assert layer.duplicates_on_rank == 0


def test_its_first_replicas_are_as_eplb_places_them():
    loads_YE = skewed(2, 32)
    own = plan(loads_YE, ranks=8, algorithm="eplb").layers
    for layer, bare in zip(lplb(loads_YE, 8, 40).layers, own, strict=True):
        assert [set(held[:4]) for held in layer.experts_of_rank] == [
            set(held) for held in bare.experts_of_rank
        ]


def test_a_matrix_of_ones_own_repeats_for_every_group():
    (layer,) = lplb(np.arange(8.0, 0, -1)[None], 4, 12, r2o=[[1], [0]]).layers
    own = [held[0] for held in layer.experts_of_rank]
    assert [held[2] for held in layer.experts_of_rank] == [own[1], own[0], own[3], own[2]]


def test_no_redundant_slots_and_a_single_rank():
    assert lplb(skewed(1, 8), 4, 8).slots == 8
    assert lplb(skewed(1, 8), 1, 8).duplicates_on_rank == 0


def test_layers_without_load_are_even():
    loads_YE = skewed(2, 16)
    loads_YE[0] = 0
    assert lplb(loads_YE, 4, 20).layers[0] == Layout.even(16, 4, 20)


@pytest.mark.parametrize(
    ("ranks", "slots", "options", "message"),
    [
        (8, 40, {"topology": "cub"}, "topology: 'cub' is unknown, did you mean 'cube'"),
        (8, 40, {"topology": 3}, "topology: 3 is unknown"),
        (4, 36, {"topology": "cube"}, "a cube is for 8 ranks, or groups of 8, not 4"),
        (8, 40, {"topology": "hypercube"}, "a hypercube is for 16 ranks"),
        (8, 40, {"topology": "torus"}, "a torus needs two nodes or more"),
        (8, 40, {"topology": "torus", "node_size": 8}, "a torus needs two nodes or more"),
        (8, 56, {"topology": "cube"}, "topology 'cube' has 2 redundant slots a rank, not 3"),
        (8, 72, {}, "lplb copies each expert once at most"),
        (8, 40, {"topology": "ring", "r2o": [[1], [0]]}, "r2o: cannot be given beside topology"),
        (
            8,
            48,
            {"r2o": [[1], [0]]},
            "48 leave 2 redundant slots a rank, but r2o has 1 columns; use 40 slots",
        ),
        (8, 40, {"r2o": [[1], [2], [0]]}, "groups of 3 ranks do not divide the 8 ranks"),
        (8, 40, {"r2o": [[1], [1]]}, "column 0 is no permutation of 0 to 1"),
        (8, 40, {"r2o": [[-1], [0]]}, "column 0 is no permutation"),
        (8, 48, {"r2o": [[1, 0], [0, 1]]}, "column 1 copies rank 0 to itself"),
        (8, 40, {"r2o": [[1], [0, 1]]}, "r2o: rows of different length"),
        (8, 40, {"r2o": [[1.0], [0.0]]}, "must be a matrix"),
        (8, 40, {"r2o": [1, 0]}, "must be a matrix"),
        (8, 40, {"r2o": "cube"}, "must be a matrix"),
        (6, 36, {}, "6 do not divide them"),
        (8, 40, {"r20": [[1], [0]]}, "r20: is no option of lplb, did you mean 'r2o'"),
    ],
)
def test_graphs_that_cannot_be_are_refused(ranks, slots, options, message):
    with pytest.raises(ConfigError, match=message):
        lplb(skewed(1, 32), ranks, slots, **options)
