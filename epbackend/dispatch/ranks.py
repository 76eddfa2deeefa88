"""Which ranks share the experts, and which of them hold the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class RankGroup:
    """This rank's place among the R ranks that share the experts.

    `token_group` are the ranks that hold the same tokens (attention tensor parallelism), a part of `group`;
    its size 1 means that every rank has tokens of its own. Such a part, whose ranks follow each other in `group`, is a
    *source* of tokens.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    token_group: dist.ProcessGroup | None = None
    token_rank: int = 0
    token_size: int = 1

    @property
    def sources(self) -> int:
        """Sources of tokens."""
        return self.size // self.token_size

    @property
    def source(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.token_size

    @classmethod
    def single(cls) -> RankGroup:
        """One rank with all experts: no process group, no collectives."""
        return cls(None, 0, 1)

    @classmethod
    def of(cls, group: dist.ProcessGroup, token_group: dist.ProcessGroup | None = None) -> RankGroup:
        """The place of the calling rank in torch process groups that are already set up."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if token_group is None:
            return cls(group, rank, size)
        return cls(
            group, rank, size, token_group, dist.get_rank(token_group), dist.get_world_size(token_group)
        )
