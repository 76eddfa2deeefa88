"""Made-up counts of tokens from which EPLB makes a given layout.

EPLB packs replicas heaviest first, each onto the lightest rank with room. With nearly equal loads it therefore fills
the ranks row by row, a replica on every rank, lightest rank first. Small differences between loads decide which rank
is lightest, and we choose them. Replicas of one expert weigh the same, so they follow one another, onto ranks that must
be next in order. So the experts with several replicas are gathered in rounds, a row each, in which every rank is used
at most once; the other ranks of a row get experts with one replica. Two rows of such experts come first and bring the
ranks into the order that the first round needs. Any order can be reached, because along the ranks the first row falls
and the second rises, as steeply as needed. What is left after the rounds may come in any order.

Going backwards from the last round, `_heights_before` finds how the loads of the ranks must differ before each row. The
differences grow with every round, and float32 has room for some millions; a row of experts with one replica between two
rounds makes them small again, so spare rows go there.

EPLB replicates the expert with the most load per replica, so nearly equal loads give every expert its replicas. What
this construction cannot reach (more rounds than rows, differences too fine) another one may; the answer is checked by
running EPLB.
"""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.placement import Layout
from epbackend.placement.planners.eplb import rebalance

EXACT = 1 << 24
"""Whole numbers below this add up exactly in float32, which LMDeploy computes in."""

TOO_FINE = "the differences between loads that it takes are too fine for float32"

STEERING = 2
"""Rows at the start, of experts with one replica, that bring the ranks into any order."""

Round = list[tuple[int, list[int]]]
"""Experts with several replicas, each with its ranks; no rank twice."""


def counts_for(layout: Layout) -> np.ndarray:
    """Made-up tokens of each expert, int64 [E].

    Raises:
        ConfigError: this construction finds none; with the reason, without the number of the layer.
    """
    if layout.duplicates_on_rank:
        raise ConfigError("a rank holds two replicas of one expert")
    rounds, each = _rounds(layout), layout.slots // layout.ranks
    spare = each - STEERING - len(rounds)
    if rounds and spare < 0:
        raise ConfigError(
            f"experts with several replicas need {len(rounds)} of its {each} rows, and {STEERING} more "
            "have to stay free"
        )
    rounds = _with_rests(rounds, spare)
    load_E = _loads(layout, rounds)
    count_E = load_E * layout.replicas_E
    expert_RL = rebalance(count_E[None].astype(np.float64), layout.slots, layout.ranks).reshape(
        layout.ranks, each
    )
    wanted_RL = np.array(layout.experts_of_rank)
    if (np.sort(expert_RL) != np.sort(wanted_RL)).any():
        raise ConfigError(TOO_FINE if each > 1 else "with one slot a rank it keeps experts in order")
    return count_E


def _rounds(layout: Layout) -> list[Round]:
    """The experts with several replicas in few rounds: most replicas first, each into the first round with room."""
    rounds: list[Round] = []
    taken: list[set[int]] = []
    replicated = [
        int(expert)
        for expert in np.argsort(-layout.replicas_E, kind="stable")
        if layout.replicas_E[expert] > 1
    ]
    for expert in replicated:
        ranks = layout.rank_of_slot_P[layout.slots_EC[expert, : layout.replicas_E[expert]]].tolist()
        index = next((index for index, used in enumerate(taken) if used.isdisjoint(ranks)), len(rounds))
        if index == len(rounds):
            rounds.append([])
            taken.append(set())
        rounds[index].append((expert, ranks))
        taken[index].update(ranks)
    return rounds


def _with_rests(rounds: list[Round], spare: int) -> list[Round]:
    """The rounds with empty ones between them, at most one before each: after those, differences are small again."""
    rests = min(spare, len(rounds))
    before = {index * len(rounds) // rests for index in range(rests)}
    return [
        each for index, found in enumerate(rounds) for each in ([[], found] if index in before else [found])
    ]


def _loads(layout: Layout, rounds: list[Round]) -> np.ndarray:
    """The load of one replica of each expert, int64 [E]: of the rows for the rounds, then of the other experts."""
    replicas_E = layout.replicas_E
    singles = [[expert for expert in held if replicas_E[expert] == 1] for held in layout.experts_of_rank]
    load_E = np.zeros(layout.experts, dtype=np.int64)
    height_R = np.zeros(layout.ranks, dtype=np.int64)
    least = EXACT // max(int(layout.slots_R.max()), int(replicas_E.max())) - 1
    steered = zip(_rows(layout.ranks, rounds), [[]] * STEERING + rounds, strict=False)
    for row_R, experts in steered:
        load_R = row_R - row_R.max() + least - 1
        expert_of_rank = {rank: expert for expert, ranks in experts for rank in ranks}
        for rank in range(layout.ranks):
            expert = expert_of_rank.get(rank)
            load_E[singles[rank].pop() if expert is None else expert] = load_R[rank]
        height_R += load_R
        least = int(load_R.min())
    for _ in range(sum(map(len, singles))):
        least -= 1
        rank = min((rank for rank in range(layout.ranks) if singles[rank]), key=height_R.__getitem__)
        load_E[singles[rank].pop()] = least
        height_R[rank] += least
    if least < 1:
        raise ConfigError(TOO_FINE)
    return load_E


def _rows(ranks: int, rounds: list[Round]) -> list[np.ndarray]:
    """The loads of the rows of the rounds, first to last: what each rank gets, int64 [R], up to a constant per row."""
    if not rounds:
        return []
    loads: list[np.ndarray] = []
    height_R = np.zeros(ranks, dtype=np.int64)
    for experts in reversed(rounds):
        before_R = _heights_before(_blocks(experts, height_R), height_R)
        loads.append(height_R - before_R)
        height_R = before_R
    before_R = _heights_before([[rank] for rank in reversed(range(ranks))], height_R)
    return [before_R, height_R - before_R, *reversed(loads)]


def _blocks(experts: Round, after_R: np.ndarray) -> list[list[int]]:
    """The ranks in the order in which EPLB fills them, those of one expert together; the heaviest after the row first.

    So heights before the row rise by 1 at most from block to block, and stay small.
    """
    blocks = [sorted(ranks, key=after_R.__getitem__) for _, ranks in experts]
    used = {rank for block in blocks for rank in block}
    blocks += [[rank] for rank in range(len(after_R)) if rank not in used]
    return sorted(blocks, key=lambda block: -after_R[block[0]])


def _heights_before(blocks: list[list[int]], after_R: np.ndarray) -> np.ndarray:
    """The loads of the ranks before a row that fills the blocks in order and leads to `after_R`, int64 [R].

    The lightest rank is filled first, so these heights rise in that order, and the loads of the row fall from block to
    block. So heights rise by one more between blocks than they do after the row, and by the same within a block.
    """
    before_R = np.zeros_like(after_R)
    last = None
    for block in blocks:
        for position, rank in enumerate(block):
            if last is not None:
                rise = int(after_R[rank] - after_R[last])
                before_R[rank] = before_R[last] + (rise if position else max(1, rise + 1))
            last = rank
    return before_R
