"""docs/serving.md: the server starts with its command, and answers its examples as they are written,
but for the port.
"""

import os
import re
import subprocess
import sys

import pytest

from internvl3_jax.serve import arguments
from internvl3_jax.serve.chat_request import IGNORED, NEUTRAL
from tests.support import documented_world
from tests.support.documents import FENCE, ROOT, commands, snippets
from tests.support.server_process import server_process

PAGE = "docs/serving.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
WRITTEN = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return documented_world.build(tmp_path_factory.mktemp("page") / "clone", PAGE, "DIR cat.jpg")


@pytest.fixture(scope="module")
def server(folder):
    (written,) = [
        command.text
        for command in commands(PAGE)
        if command.text.startswith("python -m internvl3_jax.serve --checkpoint")
    ]
    flags = written.split()[3:]
    with server_process(flags, folder=folder) as started:
        yield started


def test_shell(server, folder):
    (block,) = [block[3] for block in FENCE.finditer(TEXT) if block[2] == "bash"]
    script = f"set -e\n{block.replace(WRITTEN, server.url)}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert '"object":"list"' in done.stdout and '"chat.completion"' in done.stdout
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_python(server, folder):
    ((_, snippet),) = snippets(PAGE)
    done = subprocess.run(
        [sys.executable, "-c", snippet.replace(WRITTEN, server.url)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "CompletionUsage" in done.stdout


def test_options_exist(capsys):
    """Every --option of this server that the page names."""
    others = {"--model", "--tasks", "--model_args", "--to", "--api-mode", "--base-url", "--key"}
    others |= {"--data", "--api-nproc", "--temperature", "--max-tokens", "--trust-remote-code"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT.split("## Other servers")[0]))
    with pytest.raises(SystemExit):
        arguments.parse(["--help"])
    known = set(re.findall(r"--[a-z]\w*", capsys.readouterr().out))
    assert named - others - known == set()


def test_fields_exist():
    """The fields that the page calls ignored, or accepted with one value, are."""
    assert {"user", "metadata", "store", "service_tier", "parallel_tool_calls"} <= set(IGNORED)
    assert "reasoning_effort" in IGNORED
    assert NEUTRAL["tools"] == ([],) and NEUTRAL["use_beam_search"] == (False,)
