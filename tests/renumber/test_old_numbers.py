"""A renumbered checkpoint with loads or placements of before: an engine translates or refuses them."""

from __future__ import annotations

import numpy as np
import pytest

from epbackend import EPConfig
from epbackend.engines.lmdeploy.checks import check_deployment
from epbackend.engines.lmdeploy.load.recording import Recording
from epbackend.errors import ConfigError
from epbackend.models import resolve
from epbackend.placement import plan
from epbackend.placement.formats import write
from epbackend.placement.loads import ORIGINAL, Loads
from epbackend.placement.renumbering import Renumbering
from epbackend.renumber import plan_renumbering
from epbackend.renumber import write as write_model

pytestmark = [pytest.mark.cpu, pytest.mark.engine]

MODEL = "tiny-qwen3-moe"
RECORDED = Loads.of(np.random.default_rng(0).integers(1, 999, (4, 32)).astype(float), ["recorded"], ORIGINAL)


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("renumbered") / "model"
    write_model(plan_renumbering(MODEL, RECORDED, ranks=4), folder)
    return folder


def placed(model, **placement):
    config = EPConfig.load({"device": "cpu", "ep_size": 2, "placement": placement})
    return check_deployment(str(model), config, serving=False)


def test_loads_and_placements_of_the_original_place_the_same_experts(renumbered, tmp_path):
    write(RECORDED, tmp_path / "loads.json", "sglang")
    planned = plan(RECORDED, ranks=2)
    write(planned, tmp_path / "placement.json", "epbackend")
    old_YE = Renumbering.beside(renumbered).old_YE
    for given in ({"loads": str(tmp_path / "loads.json")}, {"file": str(tmp_path / "placement.json")}):
        found = placed(renumbered, **given)
        for layer, (new, old) in enumerate(zip(found.layers, planned.layers, strict=True)):
            as_before = [{int(old_YE[layer, expert]) for expert in held} for held in new.experts_of_rank]
            if "file" in given:
                assert as_before == [set(held) for held in old.experts_of_rank]
            load_R = [sum(RECORDED.tokens_WYE[0, layer, list(held)]) for held in as_before]
            assert max(load_R) < 1.01 * np.mean(load_R)


def test_what_is_recorded_says_whose_numbers_it_counts_and_fits_no_other_checkpoint(renumbered, tmp_path):
    own = Recording.of(tmp_path / "new.json", str(renumbered), 2)
    assert own.numbering == Renumbering.beside(renumbered).name
    assert Recording.of(tmp_path / "old.json", resolve(MODEL), 2).numbering == ORIGINAL
    write(Loads(RECORDED.tokens_WYE, ("new",), own.numbering), tmp_path / "new.json", "sglang")
    assert placed(renumbered, loads=str(tmp_path / "new.json")) is not None
    with pytest.raises(
        ConfigError, match=r"placement: loads: new count experts by the numbers of the renumbered"
    ):
        placed(resolve(MODEL), loads=str(tmp_path / "new.json"))
