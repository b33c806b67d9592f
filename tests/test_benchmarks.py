"""The benchmarks run, at a size that says nothing about speed, and what they compare agrees."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cpu_peer(tmp_path_factory):
    """(the report as JSON, what was printed) of cpu_peer.py --smoke."""
    output = tmp_path_factory.mktemp("cpu_peer") / "report.json"
    command = [sys.executable, "benchmarks/cpu_peer.py", "--smoke", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(output.read_text()), done.stdout


def test_cpu_peer_agrees(cpu_peer):
    report, _ = cpu_peer
    assert report["parity"]["logits_error"] < 1e-4
    assert report["parity"]["greedy_tokens_equal"]
    assert {
        len(tokens) for side in report["rounds"].values() for tokens in side[0]["tokens"].values()
    } == {9}


def test_cpu_peer_reports_every_case(cpu_peer):
    report, printed = cpu_peer
    assert set(report["cases_ms"]) == {"vision", "prefill", "first_token", "decode"}
    for case in report["cases_ms"].values():
        assert case["jax"]["min"] > 0
        assert case["ratio"]["min"] == pytest.approx(
            case["torch"]["min"] / case["jax"]["min"], rel=1e-2
        )
    for sizes in report["memory_gib"].values():
        assert 0.05 < sizes["jax"] < 8
    assert {"cpu", "cores"} <= set(report["machine"])
    assert {"python", "jax", "torch", "transformers"} == set(report["versions"])
    assert "ms per token" in printed
