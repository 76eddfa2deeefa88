"""`epbackend config check | show | schema`."""

import json

import pytest
from typer.testing import CliRunner

from epbackend.cli import app
from epbackend.config import EPConfig
from epbackend.config.docs import settings


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["config", *(str(argument) for argument in arguments)])


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        return path

    return write


def test_check_accepts_a_valid_file(run, write):
    result = run("check", write("ep_size: 2\nep_level: 2\n"))
    assert result.exit_code == 0
    assert "OK" in result.stdout
    assert "ep_size 2" in result.stdout


def test_check_lists_what_has_no_effect(run, write):
    result = run("check", write("alltoall_ep_buffer_scale_factors: [[0, 8.0]]\n"))
    assert result.exit_code == 0
    assert "warning: alltoall_ep_buffer_scale_factors has no effect" in result.stdout


def test_check_lists_every_error_and_exits_with_2(run, write):
    result = run("check", write("ep_level: 3\nalltoall_ep_buffer_scale_factors: [[8, 0]]\n"))
    assert result.exit_code == 2
    assert "ep_level: must be 1" in result.stderr
    assert "alltoall_ep_buffer_scale_factors[0][1]: should be greater than 0 (got 0)" in result.stderr
    assert "Traceback" not in result.output


def test_check_refuses_a_missing_file(run, tmp_path):
    result = run("check", tmp_path / "no.yaml")
    assert result.exit_code == 2
    assert "no such file" in result.stderr


def test_show_lists_every_setting_and_marks_what_the_file_sets(run, write):
    result = run("show", write("ep_size: 2\n"))
    assert result.exit_code == 0
    assert result.stdout.count("default") >= len(settings()) - 1


def test_show_json_has_values_and_defaults(run, write):
    shown = json.loads(run("show", write("ep_size: 2\nengine: {dp: 2}\n"), "--json").stdout)["settings"]
    assert shown.keys() == {setting.name for setting in settings()}
    assert (shown["ep_size"]["value"], shown["ep_size"]["default"], shown["ep_size"]["is_default"]) == (
        2,
        1,
        False,
    )
    assert {name for name, entry in shown.items() if not entry["is_default"]} == {"ep_size", "engine.dp"}
    assert shown["ep_size"]["description"] == EPConfig.model_fields["ep_size"].description


def test_show_without_a_file_shows_the_defaults(run):
    shown = json.loads(run("show", "--json").stdout)["settings"]
    assert all(entry["is_default"] for entry in shown.values())


def test_schema_prints_a_json_schema(run):
    schema = json.loads(run("schema").stdout)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"ep_size", "moe_ep", "engine"} <= schema["properties"].keys()
