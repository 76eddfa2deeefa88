"""docs/configuration.md, the examples and the JSON schema agree with the fields."""

import json
import re
import warnings
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import given

from epbackend.config import ConfigWarning, EPConfig
from epbackend.config import mindie as mindie_file
from epbackend.config.docs import json_schema, markdown, settings
from epbackend.config.files import read_mapping
from tests.helpers.config_strategies import settings as valid_settings

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "configs").iterdir())
SCHEMA = jsonschema.Draft202012Validator(json_schema())


def test_the_documented_table_is_up_to_date():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert markdown() in text, "paste the output of epbackend.config.docs.markdown()"


def test_every_mapped_mindie_key_is_documented():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for (_, key), setting in mindie_file.COUNTERPARTS.items():
        assert re.search(rf"`{key}`.*`{re.escape(setting)}`", text)


def test_every_setting_is_described_in_one_short_paragraph():
    for setting in settings():
        assert 10 < len(setting.description) < 300, setting.name
        assert setting.description.endswith("."), setting.name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_without_warnings(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigWarning)
        config = EPConfig.load(path)
    assert config.device == path.name.split("-")[0].replace("mindie", "ascend")
    unexpected = [str(warning.message) for warning in caught if "MindIE" not in str(warning.message)]
    assert unexpected == []
    if path.suffix == ".yaml":
        SCHEMA.validate(read_mapping(path))


def test_there_is_an_example_for_every_deployment():
    assert {path.name.split("-")[0] for path in EXAMPLES} == {"cpu", "cuda", "ascend", "mindie"}


def test_the_schema_is_valid_and_refuses_what_we_refuse():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    for bad in (
        {"ep_level": 3},
        {"epsize": 2},
        {"topk_scaling_factor": 2},
        {"engine": {"tp": 0}},
        {"ep_size": "2"},
        {"dispatcher": 3},
    ):
        assert not SCHEMA.is_valid(bad), bad


@hypothesis.settings(max_examples=40)
@given(valid_settings())
def test_the_schema_accepts_every_valid_file(mapping):
    SCHEMA.validate(mapping)
    SCHEMA.validate(yaml.safe_load(yaml.safe_dump(mapping)))


def test_the_schema_accepts_what_we_write():
    SCHEMA.validate(json.loads(EPConfig(ep_size=2, ep_level={"prefill": 2, "decode": 1}).to_json()))


def test_the_schema_accepts_other_names_and_every_form_of_dispatcher():
    for found in ({"moe_ep": 2}, {"transport": "int8"}, {"dispatcher": "a, b"}, {"dispatcher": ["a", "b"]}):
        SCHEMA.validate(found)
