"""Packs of every family against engines outside of the pack's own process: transformers, our server
and infer.py, as users run them.
"""

import sys

import pytest

from internvl3_jax.parity import pack as writer
from internvl3_jax.parity.__main__ import main
from internvl3_jax.parity.tiny_config import FAMILIES
from tests.support.server_process import ROOT, ServerProcess

CASES = ("image", "video", "v2pe")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack of every family, with the cases of CASES."""
    root, requests = tmp_path_factory.mktemp("parity") / "pack", writer.requests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            writer, "requests", lambda *given: {name: requests(*given)[name] for name in CASES}
        )
        writer.write_pack(root)
    return root


def test_transformers_passes_on_every_family(pack, capsys):
    assert main(["check", str(pack), "--engine", "transformers"]) == 0
    printed = capsys.readouterr().out
    for name in FAMILIES:
        assert f"{name}, transformers, float32:" in printed
    stages = "token_ids, prompt_tokens, tower, projector, embeddings, hidden_first, hidden_last"
    assert printed.count(f"equal: {stages}, logits, logprobs, answer_ids") == 12
    assert "12 equal, 0 not, 0 left out" in printed


def test_transformers_is_not_given_what_it_would_fill_at_random(pack, capsys):
    """It has no model for the original layout, and would make one of its default size."""
    assert main(["check", str(pack), "--engine", "transformers", "--layout", "internvl"]) == 1
    error = capsys.readouterr().err
    assert "has the model type 'internvl_chat'" in error and "--to hf" in error


@pytest.mark.parametrize("name", ["internvl3", "v2pe"])
def test_the_server_passes(pack, name, capsys):
    server = ServerProcess([f"--checkpoint={pack / name / 'internvl'}", "--dtype=float32"])
    try:
        server.wait_until_ready()
        asked = ["check", str(pack), "--engine", "http", "--model", name]
        assert main([*asked, "--url", f"{server.url}/v1", "--ours"]) == 0
        printed = capsys.readouterr().out
        for case in CASES:
            assert f"{case:8} equal: prompt_tokens, logprobs, answer\n" in printed
        assert "3 equal, 0 not, 0 left out" in printed
        if name == "internvl3":  # with nothing but OpenAI's fields
            assert main([*asked, "--url", f"{server.url}/v1"]) == 0
            assert "1 equal, 0 not, 2 left out" in capsys.readouterr().out
    finally:
        server.close()


def test_infer_passes(pack, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = f"{sys.executable} -m tests.support.parity_infer"
    asked = ["check", str(pack), "--engine", "command", "--model", "v2pe", "--command", command]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    for case in CASES:
        assert f"{case:8} equal: tile_counts, prompt_tokens, answer_ids, answer\n" in printed
