"""A model's files are found by path, by the name of a packaged model, or by a name in the hub."""

import huggingface_hub
import pytest

from epbackend.engines.lmdeploy.hub import locate
from epbackend.errors import UnavailableError
from epbackend.models import resolve


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client, off line, with a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_paths_and_packaged_names_stay_local(tmp_path):
    assert locate(str(tmp_path)) == str(tmp_path)
    assert locate("/no/such/model") == "/no/such/model"
    assert locate("tiny-qwen3-moe") == resolve("tiny-qwen3-moe")


def test_a_hub_model_comes_from_the_cache(hub):
    snapshot = hub / "models--someone--moe" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (hub / "models--someone--moe" / "refs").mkdir()
    (hub / "models--someone--moe" / "refs" / "main").write_text("abc")
    assert locate("someone/moe") == str(snapshot)


def test_a_hub_model_that_is_not_there_is_refused(hub):
    with pytest.raises(UnavailableError, match="the hub did not give a model of that name"):
        locate("someone/moe")
