"""The server's program: its command line, and how its process ends."""

import concurrent.futures
import signal
import socket
import sys
import time

import openai
import pytest

from internvl3_jax.io import command_line
from internvl3_jax.serve import __main__ as program
from internvl3_jax.serve import arguments
from tests.support.server_process import MODEL, server_process

# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve"])
    monkeypatch.delenv(arguments.KEY_VARIABLE, raising=False)


@pytest.mark.parametrize(
    "flags, text",
    [
        ("", "--checkpoint"),
        ("--chekpoint x", "did you mean '--checkpoint'"),
        ("--checkpoint x --host 0.0.0.0", "give --api_key_file FILE"),
        ("--checkpoint x --host ::", "give --api_key_file FILE"),
        ("--checkpoint x --port 70000", "must be from 0 to 65535"),
        ("--checkpoint x --rows 0", "must be at least 1"),
        ("--checkpoint x --rows many", "invalid whole number value: 'many'"),
        ("--checkpoint x --allow_files nowhere", "is not a folder"),
        ("--checkpoint x --api_key_file nowhere", "cannot be read"),
        ("--checkpoint x --quantize_tower", "about --weights"),
        ("--checkpoint x --allow_private_hosts", "about --allow_hosts"),
        ("--checkpoint x --tiles some", "invalid choice"),
    ],
)
def test_wrong_command_lines(flags, text, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        arguments.parse(flags.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and text in line and "--help" in line


@pytest.mark.parametrize(
    "flags, text",
    [
        ("--checkpoint nowhere", "does not exist"),
        (f"--checkpoint {MODEL} --delta 1/3", "delta '1/3'"),
        (f"--checkpoint {MODEL} --adapter =x", "--adapter is"),
        (f"--checkpoint {MODEL} --host 192.0.2.1 --without_key", "cannot listen there"),
    ],
)
def test_refused(flags, text, capsys):
    options = arguments.parse([*flags.split(), "--compilation_cache", "", "--port", "0"])
    assert command_line.call(lambda: program.main(options)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and text in line


def test_an_address_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = arguments.parse(["--checkpoint", str(MODEL), "--port", str(port)])
        with pytest.raises(OSError, match="cannot listen there"):
            program.main(options)


def test_keys(tmp_path, monkeypatch, capsys):
    path = tmp_path / "key"
    path.write_text("of-the-file\n")
    monkeypatch.setenv(arguments.KEY_VARIABLE, "of-the-variable")
    assert arguments.parse(["--checkpoint", "x"]).api_key == "of-the-variable"
    flags = ["--checkpoint", "x", "--host", "0.0.0.0", "--api_key_file", str(path)]
    assert arguments.parse(flags).api_key == "of-the-file"
    path.write_text("two words")
    with pytest.raises(SystemExit):
        arguments.parse(flags)
    assert "of printable letters" in capsys.readouterr().err
    # No key on the command line, where other users of the machine see it.
    with pytest.raises(SystemExit):
        arguments.parse(["--checkpoint", "x", "--api_key", "secret"])
    assert "did you mean '--api_key_file'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        arguments.parse(["-h"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for heading in ("Model:", "Network:", "Engine:", "Limits:", "Checks:"):
        assert heading in text


# --- the process ---------------------------------------------------------------------------------

HI = [{"role": "user", "content": "Hello"}]


def connect(server, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, **options)


def test_sigterm_drains():
    """Requests that run finish, and the exit status is 0."""
    # Every answer takes at least 16 rounds.
    slower = """
import time
from internvl3_jax.inference.engine.engine import Engine
step = Engine.step
Engine.step = lambda engine: (time.sleep(0.1), step(engine))[1]
"""
    with server_process(before=slower) as server, connect(server) as client:
        assert client.models.list().data[0].id == "tiny_digits"

        def ask(stream: bool):
            answer = client.chat.completions.create(
                model="tiny_digits",
                messages=HI,
                max_tokens=16,
                stream=stream,
                extra_body={"guided_regex": "[a-z]{200}"},  # one token in a round
            )
            if not stream:
                return answer.choices[0].message.content, answer.choices[0].finish_reason
            pieces = list(answer)
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            return text, pieces[-1].choices[0].finish_reason

        expected = ask(False)
        assert expected[1] == "length" and len(expected[0]) >= 16
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, stream) for stream in (False, True, False)]
            time.sleep(0.7)
            server.process.send_signal(signal.SIGTERM)
            assert [future.result(timeout=120) for future in asked] == [expected] * 3
        assert server.process.wait(60) == 0, server.log
        assert "draining" in server.log
        with pytest.raises(openai.APIConnectionError):
            ask(False)


def test_a_failing_engine_ends_the_process():
    failing = """
from internvl3_jax.inference.engine.engine import Engine
step = Engine.step
def failing(engine):
    if engine.stats.new_tokens > 30:
        raise RuntimeError("the device is gone")
    return step(engine)
Engine.step = failing
"""
    with server_process(before=failing) as server, connect(server, timeout=120) as client:
        with pytest.raises(openai.InternalServerError, match="fail"):
            for _ in range(20):
                client.chat.completions.create(
                    model="tiny_digits",
                    messages=HI,
                    max_tokens=8,
                    extra_body={"guided_regex": "[a-z]{200}"},
                )
        assert server.process.wait(60) == 1
        assert "the device is gone" in server.log  # where to look
