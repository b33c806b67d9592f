"""A server on two processes, as on two hosts that hold the model together."""

import json
import urllib.request

from examples.experiment import read_jsonl
from tests.support.live_server import parts, user
from tests.support.local_processes import free_address
from tests.support.server_process import MODEL, ServerProcess


def test_two_hosts_serve_as_one():
    """The first host serves, the second follows; both end when the first one drains."""
    from PIL import Image

    rows = [row for row in read_jsonl(MODEL / "questions.jsonl") if row["task"] == "read"][:2]
    address = free_address()
    # Only of one process: the tests' cache has programs of other numbers of devices.
    before = (
        "import os; os.environ['JAX_NUM_CPU_DEVICES'] = '1'; "
        "os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'"
    )
    common = ["--hosts", "--fsdp=2", f"--coordinator={address}", "--processes=2"]
    common += ["--compilation_cache="]
    servers = [
        ServerProcess([*common, f"--process={number}"], before=before) for number in range(2)
    ]
    try:
        servers[0].wait_until_ready()
        for row in rows:
            image = Image.open(MODEL / row["image"][0])
            body = {"messages": user(parts("Read the number.", image)), "temperature": 0}
            request = urllib.request.Request(
                f"{servers[0].url}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=280) as answer:
                reply = json.load(answer)
            assert reply["choices"][0]["message"]["content"] == row["expected"]
        grammar = {"messages": user("hi"), "guided_choice": ["yes", "no"], "max_tokens": 8}
        request = urllib.request.Request(
            f"{servers[0].url}/v1/chat/completions",
            json.dumps(grammar).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=280) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] in ("yes", "no")
        assert servers[1].process.poll() is None
        assert servers[0].end() == 0, servers[0].log
        assert servers[1].process.wait(120) == 0, servers[1].log
        assert "models" not in servers[1].log
    finally:
        for server in servers:
            server.close()
