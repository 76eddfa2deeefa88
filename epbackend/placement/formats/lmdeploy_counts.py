"""Made-up counts of tokens from which EPLB makes a given layout.

EPLB packs replicas heaviest first, each onto the lightest rank with room. With nearly equal loads it therefore fills
the ranks row by row, a replica on every rank, lightest rank first; who is lightest is decided by small differences, and
those are ours. Replicas of one expert weigh the same, so they come one after another, onto ranks that must be next in
line. So the experts with several replicas are gathered in rounds in which no rank is asked twice, one row a round; the
ranks that a round does not ask get experts of one replica. Two rows of such experts go first and bring the ranks into
the order that the first round needs: any order is in reach, because along the ranks the first row falls and the
second rises, as steeply as we like. What is left after the rounds may come in any order.

Going backwards from the last round, `_heights_before` finds how the ranks must differ before each row. The differences
grow with every round, and float32 has room for some millions; a row of experts with one replica between two rounds
makes them small again, so rows to spare go there.

EPLB copies the expert with the most load a replica: nearly equal loads give every expert its copies. What this
construction does not reach (more rounds than rows, differences too fine) may be in reach of another one; the answer is
checked by running EPLB.
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
    """Tokens of each expert, int64 [E].

    Raises ConfigError with the reason, without the layer's number, where this construction finds none.
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
    expert_RS = rebalance(count_E[None].astype(np.float64), layout.slots, layout.ranks).reshape(
        layout.ranks, each
    )
    wanted_RS = np.array(layout.experts_of_rank)
    if (np.sort(expert_RS) != np.sort(wanted_RS)).any():
        raise ConfigError(TOO_FINE if each > 1 else "with one slot a rank it keeps experts in order")
    return count_E


def _rounds(layout: Layout) -> list[Round]:
    """The experts with several replicas in few rounds: most replicas first, each into the first round with room."""
    rounds: list[Round] = []
    taken: list[set[int]] = []
    copied = [
        int(expert)
        for expert in np.argsort(-layout.replicas_E, kind="stable")
        if layout.replicas_E[expert] > 1
    ]
    for expert in copied:
        ranks = layout.rank_of_slot_P[layout.slots_EC[expert, : layout.replicas_E[expert]]].tolist()
        index = next((index for index, used in enumerate(taken) if used.isdisjoint(ranks)), len(rounds))
        if index == len(rounds):
            rounds.append([])
            taken.append(set())
        rounds[index].append((expert, ranks))
        taken[index].update(ranks)
    return rounds


def _with_rests(rounds: list[Round], spare: int) -> list[Round]:
    """Spread between the rounds, at most one before each: empty ones, after which heights are small again."""
    rests = min(spare, len(rounds))
    before = {index * len(rounds) // rests for index in range(rests)}
    return [
        each for index, found in enumerate(rounds) for each in ([[], found] if index in before else [found])
    ]


def _loads(layout: Layout, rounds: list[Round]) -> np.ndarray:
    """The load of one replica of each expert, int64 [E]: rows for the rounds, then whatever is left."""
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
    """The loads of the steered rows, first to last: what each rank gets, up to a constant a row, int64 [R]."""
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
    """The ranks in the order they are served, those of one expert together; the highest after the row go first.

    So heights before the row need not rise by more than 1 from block to block, and stay small.
    """
    blocks = [sorted(ranks, key=after_R.__getitem__) for _, ranks in experts]
    asked = {rank for block in blocks for rank in block}
    blocks += [[rank] for rank in range(len(after_R)) if rank not in asked]
    return sorted(blocks, key=lambda block: -after_R[block[0]])


def _heights_before(blocks: list[list[int]], after_R: np.ndarray) -> np.ndarray:
    """How high the ranks stand before a row that serves the blocks in order and leaves them at `after_R`, int64 [R].

    The lightest rank is served first, so heights rise in that order; and loads fall from block to block. So heights
    rise by one more between blocks than they do after the row, and by the same within a block.
    """
    before_R = np.zeros_like(after_R)
    last = None
    for block in blocks:
        for place, rank in enumerate(block):
            if last is not None:
                rise = int(after_R[rank] - after_R[last])
                before_R[rank] = before_R[last] + (rise if place else max(1, rise + 1))
            last = rank
    return before_R
