"""How ranks may be divided: which sizes of expert, tensor and data parallelism LMDeploy can combine.

With experts spread (ep_size > 1) the world is ep_size ranks.  LMDeploy gives each of the dp attention groups
`ep_size // dp` of them by itself, so tp says nothing new and is 1, or ep_size when there is one group.
"""

from epbackend.config.problems import Problem


def world_size(ep: int, tp: int) -> int:
    """Ranks in all."""
    return ep if ep > 1 else tp


def problems(ep: int, tp: int, dp: int, executor: str) -> list[Problem]:
    """Why LMDeploy cannot run these sizes, or nothing."""
    found = [
        _dp_problem(ep, tp, dp) if dp > 1 else _tp_problem(ep, tp),
        _executor_problem(ep, tp, dp, executor),
    ]
    return [problem for problem in found if problem]


def _dp_problem(ep: int, tp: int, dp: int) -> Problem | None:
    if ep % dp:
        return Problem(
            "engine.dp",
            f"must divide ep_size {ep}, whose ranks the attention groups share: lower it, "
            f"or make ep_size a multiple of {dp}",
            dp,
        )
    if tp > 1:
        attn_tp = ep // dp
        return Problem(
            "engine.tp",
            f"must be 1 with dp {dp}: each attention group gets ep_size // dp = {attn_tp} ranks by itself; "
            "a tp of its own would split the dense layers over ranks that hold unequal numbers of tokens",
            tp,
        )
    return None


def _tp_problem(ep: int, tp: int) -> Problem | None:
    if ep > 1 and tp not in (1, ep):
        return Problem(
            "engine.tp",
            f"must be 1 or {ep} with ep_size {ep} and dp 1: attention runs on all ep_size ranks, "
            "and LMDeploy cannot give the dense layers fewer or more",
            tp,
        )
    return None


def _executor_problem(ep: int, tp: int, dp: int, executor: str) -> Problem | None:
    if dp > 1 and executor not in ("auto", "ray"):
        reason = f"must be ray or auto with dp {dp}: LMDeploy runs dp > 1 by Ray only"
        return Problem("engine.executor", reason, executor)
    world = world_size(ep, tp)
    if world > 1 and executor == "uni":
        return Problem("engine.executor", f"uni runs one rank, not {world}: write mp, ray or auto", executor)
    return None
