"""`epbackend serve`: what its switches do to the server that clients see."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from typer.testing import CliRunner

from epbackend.cli import app
from epbackend.engines.lmdeploy.hub import locate
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.engines.lmdeploy.server import serve
from epbackend.engines.lmdeploy.server.chat_templates import chat_template_config
from epbackend.engines.lmdeploy.server.front import Front
from epbackend.errors import ConfigError, EngineFailedError
from tests.helpers.engines import config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.stand_ins import scripted_servers

COMMAND = """
from epbackend.cli import main

if __name__ == "__main__":
    main()
"""
MODEL = locate("tiny-qwen3-moe")
TEMPLATE = (
    "{% for each in messages %}<|{{ 'user' if each.role == 'user' else 'bot' }}> {{ each.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|bot>{% endif %}"
)
KEY = {"Authorization": "Bearer second"}


@pytest.mark.parametrize(
    ("dp", "level"), [(1, "WARNING"), pytest.param(2, "INFO", marks=pytest.mark.slow)], ids=["dp1", "dp2"]
)
def test_a_server_with_its_switches(dp, level, tmp_path, certificate, start_process):
    key, cert = certificate
    keys, port = tmp_path / "keys", free_port()
    keys.write_text("first\nsecond\n")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    running = start_process(
        COMMAND, "serve", "tiny-qwen3-moe", "--port", str(port), "--device", "cpu", "--ep-size", "2", "--ep-level", "2",
        "--dp", str(dp), "--record", str(tmp_path / "loads.json"), "--log-level", level,
        "--set", "engine.cache_gb=0.05", "--set", "engine.session_len=256",
        "--api-key-file", str(keys), "--ssl-keyfile", str(key), "--ssl-certfile", str(cert), "--root-path", "/models/a",
        "--chat-template", str(template), "--log-requests", "--disable-uvicorn-access-log", "--enable-abort-handling",
        "--allow-terminate-by-client", "--allow-origins", "https://ui.example",
        ready="serving tiny-qwen3-moe",
    )  # fmt: skip
    base = f"https://{LOOPBACK}:{port}"
    asked = {"verify": str(cert), "timeout": PATIENCE_S}

    # What it says, in this order, is true when it is said; and no other address than that of the clients.
    said = f"serving tiny-qwen3-moe at {base}/models/a/v1 on 2 ranks\n"
    assert running.log.read_text().startswith("starting tiny-qwen3-moe on 2 ranks\n")
    assert said in running.log.read_text()
    assert set(re.findall(r"https?://[\w.:]+", running.log.read_text())) == {base}
    ready = requests.get(f"{base}/ready", headers=KEY, **asked)
    assert ready.status_code == 200, ready.text

    # The name that was typed, and no other; a key that is in the file, and no other.
    assert [
        each["id"] for each in requests.get(f"{base}/v1/models", headers=KEY, **asked).json()["data"]
    ] == ["tiny-qwen3-moe"]
    request = {"model": "tiny-qwen3-moe", "prompt": "def main(", "max_tokens": 4}
    assert requests.post(f"{base}/v1/completions", json=request, **asked).status_code == 401
    answer = requests.post(f"{base}/v1/completions", json=request, headers=KEY, **asked)
    assert answer.json()["usage"]["completion_tokens"] == 4
    talk = {"model": "tiny-qwen3-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert requests.post(f"{base}/v1/chat/completions", json=talk, headers=KEY, **asked).ok
    origin = KEY | {"Origin": "https://ui.example"}
    assert requests.get(f"{base}/v1/models", headers=origin, **asked).headers[
        "access-control-allow-origin"
    ] == ("https://ui.example")
    long = request | {"max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        cut = pool.submit(requests.post, f"{base}/v1/completions", json=long, headers=KEY, **asked)
        while not cut.done():  # it may not have come to the engine yet
            assert requests.post(f"{base}/abort_request", json={"abort_all": True}, headers=KEY, **asked).ok
        assert cut.result().status_code == 503 or cut.result().json()["usage"]["completion_tokens"] < 200
    if dp == 1:  # else it is an engine's own description
        description = requests.get(f"{base}/openapi.json", headers=KEY, **asked).json()
        assert description["servers"] == [{"url": "/models/a"}]

    running.look()
    if dp == 1:
        os.kill(running.process.pid, signal.SIGTERM)
    else:
        for path in ("terminate", "epbackend/status"):  # of this process, and not of an engine's
            refused = requests.get(f"{base}/{path}", **asked)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert requests.get(f"{base}/terminate", headers=KEY, **asked).status_code == 200
    assert running.process.wait(timeout=PATIENCE_S) == 0
    running.assert_nothing_left()
    log = running.log.read_text()
    assert "prompt='def main('" in log
    assert "prompt='<|user> hi <|bot>'" in log
    assert "POST /v1/completions" not in log
    # With dp > 1 it comes from the process before the engines.
    assert log.count("expert loads are counted from now on") == (level == "INFO")
    for noise in ("deprecated", "0it [", "Traceback", "openai_harmony", "does not support bfloat16"):
        assert noise not in log


SERVE = ("serve", "--device", "cpu", "--ep-size", "2", "tiny-qwen3-moe", "--port")
RUN = (
    "run",
    "--device",
    "cpu",
    "lmdeploy",
    "serve",
    "api_server",
    "--ep",
    "2",
    "tiny-qwen3-moe",
    "--server-port",
)


@pytest.mark.parametrize(
    ("command", "ending", "code"),
    [
        (SERVE, signal.SIGTERM, 0),
        pytest.param(SERVE, signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(RUN, signal.SIGTERM, 128 + signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["serve", "serve-ctrl-c", "run"],
)
def test_a_signal_ends_a_server_that_still_loads_its_model(command, ending, code, start_process):
    running = start_process(COMMAND, *command, str(free_port()), ready="Loading weights")
    running.look()
    running.process.send_signal(ending)
    assert running.process.wait(timeout=PATIENCE_S) == code
    running.assert_nothing_left()
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ssl-keyfile", "none.pem", "--ssl-certfile", "none.pem"], "ssl_keyfile: none.pem cannot be read"),
        (["--ssl-keyfile", __file__], "ssl_keyfile and ssl_certfile belong together"),
        (["--drain-seconds", "inf"], "drain_seconds: must be a number of seconds from 0 on, not inf"),
        (["--api-key", ""], "api_keys: one is empty"),
        (["--root-path", "a"], "root_path: a must begin with a slash"),
        (["--api-key-file", "none"], "api_key_file: none cannot be read"),
        (["--tool-call-parser", "none"], "The tool parser none is not in the parser list"),
        (["--chat-template", "none"], "chat_template: none is no file, and none of"),
        (["--ep-size", "3"], "ep_size: 3 does not divide the"),
        (["--ep-size", "2", "--dp", "3"], "engine.dp (from --dp): must divide ep_size 2"),
        (["--max-model-len", "0"], "engine.session_len (from --session-len)"),
        (["--set", "engine.sesion_len=1"], "did you mean 'session_len'?"),
        (["--set", "engine.cache_blocks=12"], "engine.cache_blocks"),
        (["--host", "203.0.113.1"], "that is no address of this machine"),  # RFC 5737
        (["--set", "engine.cache_gb=1e6"], "engine.cache_gb: 1e+06 GiB a rank: not enough memory"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(words, said):
    arguments = ["serve", "tiny-qwen3-moe", "--device", "cpu", "--port", str(free_port()), *words]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "serving" not in result.stderr


@pytest.mark.parametrize(
    ("key", "cert", "said"),
    [
        ("key.pem", "key.pem", "cannot be used: "),
        ("key.pem", ".", "cannot be used: "),
        ("foreign.pem", "certificate.pem", "cannot be used: .*certificate is of this key"),
        ("locked.pem", "certificate.pem", "wants a passphrase, .*openssl pkey"),
        ("log.txt", "certificate.pem", "cannot be used: "),
    ],
)
def test_tls_files_that_cannot_be_used_are_named(key, cert, said, certificate, tmp_path):
    """Before the model is loaded, and without asking whoever sits at the terminal."""
    (tmp_path / "log.txt").write_text("no key")
    make = ["openssl", "genpkey", "-quiet", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*make, "-out", str(tmp_path / "foreign.pem")], check=True)
    lock = ["-aes256", "-passout", "pass:word", "-out", str(tmp_path / "locked.pem")]
    subprocess.run(["openssl", "pkey", "-in", str(tmp_path / "key.pem"), *lock], check=True)
    with pytest.raises(ConfigError, match=rf"^ssl_keyfile: .*{key}.*{said}"):
        Front(ssl_keyfile=tmp_path / key, ssl_certfile=tmp_path / cert).check()


@pytest.mark.parametrize(("option", "value"), [("api_keys", ("a", "")), ("max_concurrent_requests", 0)])
def test_options_that_only_python_lets_through_are_named(option, value):
    with pytest.raises(ConfigError, match=f"^{option}: "):
        Front(**{option: value}).check()


def test_good_tls_files_are_taken(certificate):
    Front(ssl_keyfile=certificate[0], ssl_certfile=certificate[1]).check()


def test_a_server_is_started_again_when_it_fails_or_is_killed(tmp_path, caplog):
    script = tmp_path / "script"
    arguments = (str(tmp_path), config(), LOOPBACK, free_port(), None, None, Front())
    with scripted_servers():
        script.write_text("killed\nfails\nends as after a signal")
        serve.serve_model(*arguments, restart=2)
        assert "the server was killed by SIGKILL; the server is started again (2 times left)" in caplog.text
        assert "rank 1 ended; the server is started again (1 times left)" in caplog.text

        script.write_text("fails\nkilled\nends as after a signal")
        with pytest.raises(EngineFailedError, match="after 1 restarts: the server was killed by SIGKILL"):
            serve.serve_model(*arguments, restart=1)


def test_a_server_that_cannot_start_says_so_as_without_restart(tmp_path):
    (tmp_path / "script").write_text("cannot\nends as after a signal")
    with scripted_servers(), pytest.raises(ConfigError, match=r"^engine\.dp: cannot be 3$"):
        serve.serve_model(str(tmp_path), config(), LOOPBACK, free_port(), None, None, Front(), restart=2)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jinja", "{% for %}", "cannot be used with .*: Expected an expression"),
        ("a.jinja", "{{ raise_exception('only tools') }}", "cannot be used with .*: only tools"),
        (
            "a.txt",
            "{{ messages[0].content.words() }}",
            "cannot be used with .*: 'str object' has no attribute 'words'",
        ),
        ("a.json", "{", "holds none of LMDeploy's templates: Expecting property name"),
        ("a.json", "[]", "holds none of LMDeploy's templates"),
        (
            "a.json",
            '{"usr": "U:"}',
            "holds none of LMDeploy's templates: .*unexpected keyword argument 'usr'",
        ),
    ],
)
def test_a_bad_chat_template_is_named(tmp_path, name, text, said):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"^chat_template: .*{name} {said}"):
        chat_template_config(str(file), MODEL)


def test_chat_templates_travel_to_the_engines_processes(tmp_path):
    """A Jinja file, a JSON file of LMDeploy's, and a name."""
    jinja, settings = tmp_path / "a.jinja", tmp_path / "a.json"
    jinja.write_text(TEMPLATE)
    settings.write_text(json.dumps({"user": "U:", "eoh": ";", "assistant": "A:"}))
    talk = [{"role": "user", "content": "hi"}]
    for name, prompt in [(str(jinja), "<|user> hi <|bot>"), (str(settings), "U:hi;A:"), ("base", "hi")]:
        config = pickle.loads(pickle.dumps(chat_template_config(name, MODEL)))
        assert config.chat_template().messages2prompt(talk) == prompt
