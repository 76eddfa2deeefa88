"""Reading files: errors name the place of what is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.config import EPConfig
from epbackend.config.overrides import assignment
from epbackend.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "ep_size: 2\nep_level: [1\n", r"a\.yaml, line 3, column 1: "),
        ("a.yaml", "ep_size: 2\n\tep_level: 1\n", r"a\.yaml, line 2, column 1: .*'\\t'"),
        ("a.yaml", "ep_size: 2\nep_level: 1\nep_size: 4\n", r"line 3, column 1: 'ep_size' is given twice"),
        ("a.yaml", "engine:\n  tp: 1\n  tp: 2\n", r"line 3, column 3: 'tp' is given twice"),
        ("a.yaml", "- ep_size\n", r"`name: value` settings at its top level, but holds a list"),
        ("a.yaml", "just words\n", r"but holds a str"),
        ("a.yaml", "# nothing\n", r"is empty"),
        ("a.yaml", "a: 1\n---\nb: 1\n", r"line 2, column 1: "),
        ("a.yaml", "a: \x00\n", r"is not YAML"),
        ("a.yaml", "ep_size: !!python/object:os.system 2\n", r"line 1, column 10: could not determine"),
        ("a.yaml", "2: 3\n", r"\[2\]: Keys should be strings"),
        ("a.yaml", b"ep_size: \xff\n", r"is not UTF-8 text \(byte 9\)"),
        ("a.json", '{"ep_size": 2,\n "ep_level"}', r"a\.json, line 2, column 12: "),
        ("a.json", '{"ep_size": 2, "ep_size": 4}', r"'ep_size' is given twice"),
        ("a.json", "[1]", r"but holds a list"),
        ("a.json", "", r"a\.json, line 1, column 1: "),
        ("a.json", "null", r"is empty"),
        ("a.yaml", "? [a, b]\n: 1\n", r"line 1, column 3: found unhashable key"),
        ("a.json", "[" * 5000, r"nested too deeply"),
        ("a.yaml", "[" * 1000, r"nested too deeply"),
        (
            "a.yaml",
            "ep_size: 2\nplacement: {file: 2024-13-45}\n",
            r"line 2, column 19: '2024-13-45' .* quote it",
        ),
        ("a.yaml", "ep_size: 0x_\n", r"line 1, column 10: '0x_' cannot be read"),
        ("a.yaml", 'ep_size: !!int ""\n', r"line 1, column 10: '' cannot be read"),
        ("a.yaml", "ep_size: !!bool maybe\n", r"line 1, column 10: 'maybe' cannot be read"),
        ("a.yaml", "ep_size: !!timestamp now\n", r"line 1, column 10: 'now' cannot be read"),
        ("a.yaml", f"timeout_s: {'1:' * 300}1.5\n", r"line 1, column 12: '1:1:.* cannot be read"),
        ("a.yaml", f"ep_size: 0x{'f' * 5000}\n", r"line 1, column 10: '0xff.* cannot be read"),
        ("a.json", f'{{"ep_size": {"9" * 5000}}}', r"a\.json: a number cannot be read: Exceeds the limit"),
        ("a.yaml", "engine:\n  extra: &loop {revision: *loop}\n", r"engine\.extra.*[Rr]ecursion"),
    ],
)
def test_malformed_file_is_refused_with_its_place(write, name, text, message):
    with pytest.raises(ConfigError, match=message):
        EPConfig.load(write(name, text))


def test_values_of_the_command_line_are_read_as_in_a_file():
    given = map(
        assignment, ["ep_size=2", "balance={on: on}", "balance.threshold=1e-1", "engine.dtype=float32"]
    )
    config = EPConfig.load({}, given)
    assert (config.balance.on, config.balance.threshold, config.engine.dtype) == (True, 0.1, "float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("placement.file=2024-13-45", "--set placement.file=2024-13-45: .*month must be in 1..12.*quote it"),
        ("ep_size=0x_", "--set ep_size=0x_: .*'0x_' cannot be read"),
        (f"ep_size={'9' * 5000}", "--set ep_size=9+: .*cannot be read"),
        (f"ep_size={'[' * 5000}", "--set ep_size: .*nested too deeply"),
        ("balance={on: true, on: false}", "--set balance=.*'on' is given twice"),
        ('balance={"on": true, "on": false}', "--set balance=.*'on' is given twice"),
        ("engine.extra={a: 1", "--set engine.extra={a: 1: .*expected ',' or '}'"),
    ],
    ids=lambda text: text[:30],
)
def test_malformed_value_of_the_command_line_is_refused_with_its_option(text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        assignment(text)
    assert len(str(refused.value)) < 400


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        EPConfig.load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        EPConfig.load(str(tmp_path))


def test_errors_name_the_file(write):
    with pytest.raises(ConfigError, match=r"mine\.yaml: 1 problem\n  ep_size: .*got 0"):
        EPConfig.load(write("mine.yaml", "ep_size: 0\n"))


def test_yaml_json_and_mapping_load_alike(write):
    expected = EPConfig(ep_size=2, ep_level=2, engine={"dtype": "float32"})
    yaml = write("a.yaml", "ep_size: 2\nep_level: 2\nengine: {dtype: float32}\n")
    json = write("a.json", '\ufeff{"ep_size": 2, "ep_level": 2, "engine": {"dtype": "float32"}}')
    mapping = {"moe_ep": 2, "ep_level": 2, "engine": {"dtype": "float32"}}
    assert EPConfig.load(yaml) == EPConfig.load(str(json)) == EPConfig.load(mapping) == expected


def test_on_is_a_name_in_yaml_too(write):
    """In YAML 1.1, PyYAML's, a bare `on` is true, also where it is a key."""
    assert EPConfig.load(write("a.yaml", "ep_size: 2\nbalance: {on: on}\n")).balance.on
    with pytest.raises(ConfigError, match="'on' is given twice"):
        EPConfig.load(write("a.yaml", "balance:\n  on: true\n  on: false\n"))


def test_yaml_anchors_and_merges_are_no_duplicates(write):
    path = write("a.yaml", "engine: &base {tp: 1}\n")
    assert EPConfig.load(path).engine.tp == 1
    path = write("b.yaml", "engine:\n  <<: {tp: 4, dp: 1}\n  tp: 1\n")
    assert EPConfig.load(path).engine.tp == 1


@given(text=st.text(max_size=60), suffix=st.sampled_from([".yaml", ".json"]))
def test_any_text_loads_or_is_refused_in_words(tmp_path_factory, text, suffix):
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    path.write_text(text, encoding="utf-8")
    complaint = _complaint(path)
    assert complaint is None or str(path) in complaint


def _complaint(path):
    try:
        EPConfig.load(path)
    except ConfigError as error:
        return str(error)
    return None
