"""MindIE's parallel sizes, in LMDeploy's terms.

MindIE divides the cards twice: `cp * dp * tp = worldSize` for attention, `moe_ep * moe_tp = worldSize` for
experts; -1 or a missing key means "what is left".  Over several nodes worldSize counts one node's cards only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from epbackend.config.problems import NO_VALUE, Problem

SIZE_KEYS = ("worldSize", "dp", "tp", "cp", "pp", "moe_ep", "moe_tp")


class MindIEKeyError(Exception):
    """A key of a MindIE file that is malformed, contradicts another, or asks for what LMDeploy cannot do."""

    def __init__(self, key: str, message: str, value: Any) -> None:
        super().__init__(key)
        self.problem = Problem(key, message, value)


class Sizes(NamedTuple):
    """ep: expert-parallel ranks; dp: attention groups; tp: as `engine.tp` wants it."""

    ep: int
    dp: int
    tp: int


def parallel_sizes(model: Mapping[str, Any], several_nodes: bool) -> Sizes:
    """The sizes that a ModelConfig entry asks for.

    Raises:
        MindIEKeyError: the products contradict, or LMDeploy has no such form (cp, pp, moe_ep with moe_tp).
    """
    for key, meaning in (("cp", "context"), ("pp", "pipeline")):
        if (_size(model, key) or 1) > 1:
            raise MindIEKeyError(
                key, f"{meaning} parallelism has no counterpart: write 1 and raise tp or dp", model[key]
            )
    dp = _size(model, "dp") or 1
    tp, moe_ep, moe_tp = (_size(model, key) for key in ("tp", "moe_ep", "moe_tp"))
    world = None if several_nodes else _size(model, "worldSize")
    if world is None:
        world = _world_without_world_size(dp, tp, moe_ep, moe_tp, several_nodes)
    _check_product(world, {"dp": dp, "tp": tp or world // dp})
    if moe_ep is None:
        moe_ep = world // moe_tp if moe_tp else 1
    moe_tp = moe_tp or world // moe_ep
    _check_product(world, {"moe_ep": moe_ep, "moe_tp": moe_tp})
    if moe_ep > 1 and moe_tp > 1:
        raise MindIEKeyError(
            "moe_tp",
            f"LMDeploy cannot split experts that moe_ep spreads: set moe_ep {world} and moe_tp 1",
            moe_tp,
        )
    return Sizes(ep=moe_ep, dp=dp, tp=1 if dp > 1 else world)


def _size(model: Mapping[str, Any], key: str) -> int | None:
    value = model.get(key, -1)
    if type(value) is not int or (value < 1 and value != -1):
        raise MindIEKeyError(
            key, "must be a whole number of ranks, at least 1, or -1 for MindIE's default", value
        )
    return None if value == -1 else value


def _world_without_world_size(
    dp: int, tp: int | None, moe_ep: int | None, moe_tp: int | None, several_nodes: bool
) -> int:
    if tp:
        return dp * tp
    if moe_ep:
        return moe_ep * (moe_tp or 1)
    if several_nodes:
        raise MindIEKeyError(
            "worldSize", "counts one node only with multiNodesInferEnabled: write tp or moe_ep", NO_VALUE
        )
    return dp


def _check_product(world: int, factors: Mapping[str, int]) -> None:
    (first, a), (second, b) = factors.items()
    if a * b != world:
        raise MindIEKeyError(
            first, f"{first} * {second} must be {world}, the number of ranks, and {second} is {b}", a
        )
