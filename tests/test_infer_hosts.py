"""infer.py on two processes, as on two hosts that hold a model together: the answers of one."""

import json

import pytest

from tests.support import tiny_checkpoint
from tests.support.local_processes import ROOT, Processes, finish, free_address

REQUESTS = [
    {"prompt": "What is 1?"},
    {"prompt": "What is <image>?", "image": "wide.png"},
    {"prompt": "And 2?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    tiny_checkpoint.make_image(40, 16, 1).save(folder / "wide.png")
    (folder / "requests.jsonl").write_text(
        "".join(json.dumps(request) + "\n" for request in REQUESTS)
    )
    return folder


def answers(path) -> list[dict]:
    """Without the times."""

    def timeless(value):
        if isinstance(value, dict):
            return {name: timeless(part) for name, part in value.items() if "seconds" not in name}
        return [timeless(part) for part in value] if isinstance(value, list) else value

    return [timeless(json.loads(line)) for line in path.read_text().splitlines()]


def test_two_hosts_answer_as_one(folder):
    """With candidates and a critic, resuming after a first answer that only the first host has to
    know of.
    """
    checkpoint = str(tiny_checkpoint.directory())
    common = [
        str(ROOT / "infer.py"),
        "--checkpoint",
        checkpoint,
        "--compilation_cache=",
        "--requests",
        str(folder / "requests.jsonl"),
    ]
    common += ["--max_new_tokens=8", "--batch_size=4", "--best_of=2", "--critic", checkpoint]
    finish(Processes([[*common, f"--output={folder / 'one.jsonl'}"]], 1))
    expected = answers(folder / "one.jsonl")
    assert len(expected) == 3 and len(expected[1]["candidates"]) == 2
    lines, address = [], free_address()
    for number in range(2):
        output = folder / f"host_{number}.jsonl"
        own = [
            "--hosts",
            "--fsdp=2",
            f"--coordinator={address}",
            "--processes=2",
            f"--process={number}",
            f"--output={output}",
        ]
        lines.append([*common, *own])
    first = (folder / "one.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "host_0.jsonl").write_text(first)
    outs = [ended.out for ended in finish(Processes(lines, 2))]
    assert "2 answers written to" in outs[0] and "answers" not in outs[1]
    assert not (folder / "host_1.jsonl").exists()
    found = answers(folder / "host_0.jsonl")
    for row, wanted in zip(found, expected, strict=True):
        for one, other in zip(row["candidates"], wanted["candidates"], strict=True):
            assert one.pop("scores") == pytest.approx(other.pop("scores"), rel=1e-4)
            assert one.pop("score") == pytest.approx(other.pop("score"), rel=1e-4)
        assert row == wanted
