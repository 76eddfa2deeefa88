"""Which copy of its expert a token takes: batch by batch, and the same answer on every rank.

The pieces, from the counts of a batch to a slot for every choice. R sources (ranks) hold tokens, E experts are chosen,
P slots hold copies:

    counts_RE    how often each source chose each expert (all-gathered; `even` and `nearest` need the own row only)
    tokens_E     their sum over the sources
    shares_P     how many of its expert's tokens each slot takes, over all sources
    quota_P      how many of them come from one source
    slot_ids_TK  the slot of every (token, k) at that source

| split     | quota_P of source r                                                          | communication        |
|-----------|------------------------------------------------------------------------------|----------------------|
| `even`    | `even_shares(counts_E, layout, turn=r)`: copies get equal shares             | none                 |
| `nearest` | `nearest_quota(counts_E, layout, r, node_size)`: own rank, own node, rest    | none                 |
| `level`   | `own_quota(counts_RE, level_shares(tokens_E, layout), layout, r, node_size)` | all-gather of counts |

then `slot_ids_TK = assign(topk_ids_TK, quota_P, layout)`. For every source the quotas of an expert's slots sum to the
source's count of it; with `level` the sources' quotas of a slot sum to its share. All of it is integer arithmetic: no
result depends on the order of a sum, the machine or the number of threads. `reference` is the plain form of what is
compiled.
"""

from epbackend.placement.split.assign import assign
from epbackend.placement.split.even import even_shares, nearest_quota
from epbackend.placement.split.expected import SPLITS, expected_shares
from epbackend.placement.split.level import level_shares, own_quota

__all__ = [
    "SPLITS",
    "assign",
    "even_shares",
    "expected_shares",
    "level_shares",
    "nearest_quota",
    "own_quota",
]
