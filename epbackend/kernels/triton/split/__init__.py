"""The token splits on the device: from choices to a slot for each, one launch and nothing read back.

Integer for integer what `epbackend.placement.split` computes on the CPU, so that ranks of either kind agree. With more
choices than one program counts by the way (`permute_few.MOST_CHOICES`) two launches count them first; `level` with
several sources counts before it asks them.
"""

from epbackend.kernels.triton.split.even import EvenSplit
from epbackend.kernels.triton.split.level import level_split

__all__ = ["EvenSplit", "level_split"]
