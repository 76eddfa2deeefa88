"""The rules on tp, dp and ep agree with what LMDeploy itself does with them."""

from itertools import product

import pytest

from epbackend.config import EPConfig
from epbackend.config.checks import parallel_issues

SIZES = (1, 2, 3, 4, 6, 8)
ALLOWED = [
    (ep, tp, dp)
    for ep, tp, dp in product(SIZES, SIZES, SIZES)
    if not parallel_issues(ep, tp, dp, executor="auto")
]


def test_documented_sizes_are_allowed_and_no_others():
    assert {(ep, tp, dp) for ep, tp, dp in ALLOWED if ep == 1} == {(1, tp, 1) for tp in SIZES}
    assert {(tp, dp) for ep, tp, dp in ALLOWED if ep == 4} == {(1, 1), (4, 1), (1, 2), (1, 4)}


@pytest.mark.engine
@pytest.mark.parametrize(("ep", "tp", "dp"), ALLOWED)
def test_lmdeploy_arranges_the_allowed_sizes_as_we_say(ep, tp, dp):
    dist_config = pytest.importorskip("lmdeploy.pytorch.config").DistConfig
    config = EPConfig(ep_size=ep, engine={"tp": tp, "dp": dp})
    theirs = dist_config(ep=ep, tp=tp, dp=dp)
    assert (config.world_size, config.attn_tp) == (theirs.world_size, theirs.attn_tp)


@pytest.mark.engine
@pytest.mark.parametrize(("ep", "tp", "dp"), [(2, 4, 1), (1, 1, 2), (2, 1, 4), (4, 1, 3), (4, 2, 1)])
def test_lmdeploy_itself_refuses_what_we_refuse(ep, tp, dp):
    dist_config = pytest.importorskip("lmdeploy.pytorch.config").DistConfig
    assert parallel_issues(ep, tp, dp, executor="auto")
    with pytest.raises(AssertionError):
        dist_config(ep=ep, tp=tp, dp=dp)
