"""Runs, checkpoints, requests and answers in gs:// and s3:// buckets, of servers on this machine."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import infer
from convert.__main__ import main as convert
from internvl3_jax import load
from internvl3_jax.checkpoints import checkpoint, steps
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.io import remote_files
from internvl3_jax.io.checkpoint_paths import latest_step
from internvl3_jax.io.lease import Lease
from internvl3_jax.io.remote_files import as_path
from internvl3_jax.io.safe_files import FileError, InUse
from tests.support import tiny_checkpoint
from tests.support.local_processes import Processes, free_address
from tests.support.object_store import BUCKET, servers
from tests.support.tiny_checkpoint import (
    CONFIG,
    PROCESSOR,
    directory,
    random_params,
    tokenizer_files,
)

ROOT = pathlib.Path(infer.__file__).parent
STEPS, SAVE_EVERY = 6, 2
_numbers = itertools.count()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with (
        servers(tmp_path_factory.mktemp("servers")) as found,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in found.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(params=["gs", "s3"])
def root(store, request):
    """A new folder in a bucket of either kind."""
    return f"{request.param}://{BUCKET}/{os.getpid()}_{next(_numbers)}"


def same(some, others) -> bool:
    some, others = by_path(some), by_path(others)
    return some.keys() == others.keys() and all(
        np.array_equal(some[name], others[name]) for name in some
    )


# --- objects -------------------------------------------------------------------------------------


def test_addresses_and_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert (
        as_path("~/run") == as_path("run") == as_path(f"file://{tmp_path}/run") == tmp_path / "run"
    )
    assert str(as_path("gs://bucket/a b/[1]/")) == "gs://bucket/a b/[1]"
    for wrong, word in (
        ("hdfs://x/y", "unknown kind"),
        ("gs:///x", "bucket"),
        ("s3://key:secret@bucket/x", "bucket"),
    ):
        with pytest.raises(FileError, match=word) as caught:
            as_path(wrong)
        assert "secret" not in str(caught.value)


def test_what_another_process_writes_is_seen(root):
    """In a process that has listed the folder already, with epath as checkpoints are."""
    listing = "print(sorted(found.name for found in as_path(sys.argv[1]).iterdir()), flush=True)"
    program = "import sys; from internvl3_jax.io.remote_files import as_path; "
    program += f"{listing}; sys.stdin.readline(); {listing}"
    line, pipe = [sys.executable, "-c", program, root], subprocess.PIPE
    remote_files.write_bytes(as_path(root) / "a", b"a")
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "['a']\n"
        remote_files.write_bytes(as_path(root) / "b", b"b")
        assert other.communicate("go\n", timeout=60)[0] == "['a', 'b']\n"


def test_objects_are_written_listed_added_to_and_deleted(root, tmp_path):
    path = as_path(root)
    remote_files.write_bytes(path / "a/b.txt", b"abc")
    assert remote_files.read_bytes(path / "a/b.txt", max_bytes=3) == b"abc"
    with pytest.raises(FileError, match="3 bytes; at most 2"):
        remote_files.read_bytes(path / "a/b.txt", max_bytes=2)
    with pytest.raises(FileError, match="nothing.txt: there is no such object"):
        remote_files.read_bytes(path / "nothing.txt", max_bytes=2)
    before = remote_files.objects(path)
    assert [(name, size) for name, (size, _) in before.items()] == [("a/b.txt", 3)]
    remote_files.write_bytes(path / "a/b.txt", b"abd")
    assert remote_files.objects(path) != before, "a checksum tells other content of the same size"
    for number in range(20):
        remote_files.append(path / "log", f"{number}\n".encode())
    remote_files.flush()
    assert remote_files.read_bytes(path / "log", max_bytes=100).split() == [
        str(number).encode() for number in range(20)
    ]
    for content in (b"", b"\r", b"a\n\r", b"a\r\n", b"\0" * 300_000 + b"\r"):
        remote_files.write_bytes(path / "end", content)
        (tmp_path / "file").write_bytes(content)
        remote_files.upload(tmp_path, path, ["file"])
        for name in ("end", "file"):
            assert remote_files.read_bytes(path / name, max_bytes=1 << 20) == content
    remote_files.remove(path, [*remote_files.objects(path), "gone already"])
    assert remote_files.objects(path) == {}


def test_a_lease_is_kept_from_the_living_and_taken_from_the_dead(root):
    path, notes = as_path(root) / "run.lock", []
    with Lease(path, "the run"):
        with pytest.raises(
            InUse, match=f"the run is in use by another process .process {os.getpid()} on "
        ):
            Lease(path, "the run", notes.append).acquire()
    assert "waiting up to 3 s" in notes[0]
    assert not remote_files.exists(path)
    remote_files.write_bytes(path, b'{"process": 1, "host": "killed", "beat": 7}')
    with Lease(path, "the run", notes.append):
        assert "process 1 on killed" in notes[1]


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_in_object_storage(root):
    """Saved, opened, refused where it is damaged, replaced only if it was made here."""
    params = random_params(CONFIG)
    model = f"{root}/model"
    checkpoint.save_checkpoint(model, params, CONFIG, PROCESSOR, tokenizer_files())
    opened = load(model)
    assert same(opened.params, params) and (opened.config, opened.processor) == (CONFIG, PROCESSOR)
    with pytest.raises(FileExistsError, match="overwrit"):
        checkpoint.save_checkpoint(model, params, CONFIG, PROCESSOR, tokenizer_files())
    other = random_params(CONFIG, seed=1)
    checkpoint.save_checkpoint(model, other, CONFIG, PROCESSOR, tokenizer_files(), overwrite=True)
    assert same(load(model).params, other)
    remote_files.write_bytes(as_path(model) / "notes.txt", b"mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        checkpoint.save_checkpoint(
            model, params, CONFIG, PROCESSOR, tokenizer_files(), overwrite=True
        )
    assert remote_files.read_bytes(as_path(model) / "notes.txt", max_bytes=9) == b"mine"

    largest = max(remote_files.objects(as_path(model)).items(), key=lambda item: item[1])[0]
    data = bytearray(remote_files.read_bytes(as_path(model) / largest, max_bytes=1 << 30))
    data[len(data) // 2] ^= 1
    remote_files.write_bytes(as_path(model) / largest, bytes(data))
    with pytest.raises(ValueError, match="other content than was written"):
        load(model)
    remote_files.remove(as_path(model), [largest])
    with pytest.raises(ValueError, match="is missing"):
        load(model)


def test_converting_to_and_from_object_storage(root, tmp_path, capsys):
    assert convert([str(directory()), f"{root}/model", "--verify"]) == 0
    assert same(load(f"{root}/model").params, load(directory()).params)
    for source, name in ((f"{root}/model", "exported"), (directory(), "local")):
        assert convert([str(source), str(tmp_path / name), "--to", "internvl"]) == 0
    exported, local = (tmp_path / name / "model.safetensors" for name in ("exported", "local"))
    assert exported.read_bytes() == local.read_bytes()
    assert convert([f"{root}/nothing", str(tmp_path / "other")]) == 1
    assert "nothing is neither a checkpoint nor a training run" in capsys.readouterr().err


def test_steps_are_complete_with_their_last_object_and_old_ones_are_deleted(root):
    run, params = f"{root}/run", jax.tree.map(jax.numpy.asarray, random_params(CONFIG))
    given = {
        "model": CONFIG,
        "processor": PROCESSOR,
        "files": tokenizer_files(),
        "extra": {"past": {}},
    }
    state = {"moment": jax.numpy.arange(6.0)}

    def save(step: int, **more):
        steps.save_training(run, step, params, state, data={"0": {"next": step}}, **given, **more)

    save(1)
    save(2)
    unfinished = as_path(run) / "checkpoints/3"  # as a kill leaves it
    for name in (".internvl3_jax_unfinished", "internvl3_jax.json", "params/state/manifest.ocdbt"):
        remote_files.write_bytes(unfinished / name, b"{}")
    assert latest_step(run) == 2
    restored, moments, extra = steps.restore_training(
        run, 2, jax.eval_shape(lambda: params), jax.eval_shape(lambda: state)
    )
    assert (
        same(restored, params)
        and np.array_equal(moments["moment"], state["moment"])
        and extra["data"] == {"0": {"next": 2}}
    )
    save(3, keep=1)
    assert latest_step(run) == 3
    assert {name.split("/")[1] for name in remote_files.objects(as_path(run))} == {"3"}
    assert same(load(run).params, params)
    remote_files.remove(as_path(run), ["checkpoints/3/training.json"])
    with pytest.raises(ValueError, match="every step is damaged"):
        latest_step(run)


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(store, tmp_path_factory):
    """train.py as processes; call with a workdir, how many, and more flags."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(
        "from tests.support.hosts_run import hosts_config\n"
        "from tests.support.tiny_checkpoint import changed\n"
        "def get_config(): return changed(\n"
        f"    hosts_config(), steps={STEPS}, checkpoint__every={SAVE_EVERY}, logging__every=1)\n"
    )

    def start(workdir, count: int = 1) -> Processes:
        address = free_address()
        line = [str(ROOT / "train.py"), f"--config={path}", f"--workdir={workdir}"]
        own = [
            [f"--coordinator={address}", f"--processes={count}", f"--process={number}"]
            for number in range(count)
        ]
        return Processes([line + (flags if count > 1 else []) for flags in own], 2 // count)

    return start


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """Folder of a run in one piece, on this machine's disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with command(folder) as whole:
        (ended,) = whole.end(400)
    assert ended.status == 0, ended.out
    return folder


def log_of(workdir) -> list[tuple]:
    path = workdir / "log.jsonl"
    is_local = isinstance(path, pathlib.Path)
    text = path.read_bytes() if is_local else remote_files.read_bytes(path, max_bytes=1 << 20)
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row["step"], row["batch"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.slow
def test_a_killed_run_is_resumed_in_object_storage(command, undisturbed, root):
    """Killed after a save, then resumed by two processes: all steps once, with the numbers of an
    undisturbed run.
    """
    expected = log_of(undisturbed)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    with command(f"{root}/run") as killed:
        killed.wait_for(0, lambda line: line.startswith(f"step {2 * SAVE_EVERY + 1}/"))
        killed.running[0].send_signal(signal.SIGKILL)
    assert latest_step(f"{root}/run") in (SAVE_EVERY, 2 * SAVE_EVERY)
    with command(f"{root}/run", 2) as resumed:
        ended = resumed.end(400)
    assert [process.status for process in ended] == [0, 0], "\n".join(
        process.out for process in ended
    )
    assert (
        "waiting up to 3 s for a sign of life" in ended[0].out
        and "resuming from step" in ended[0].out
    )
    log = log_of(as_path(root) / "run")
    assert [row[:2] for row in log] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2:] for row in log], [row[2:] for row in expected], rtol=1e-5)
    assert remote_files.exists(as_path(root) / "run/loss.png")
    params, others = load(undisturbed).params, load(f"{root}/run").params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, others
    )


# --- requests ------------------------------------------------------------------------------------


def test_requests_and_answers_in_object_storage(ask, root, tmp_path):
    tiny_checkpoint.make_image(40, 16, 1).save(tmp_path / "wide.png")
    rows = [
        {"prompt": "Read.", "image": "wide.png"},
        {"prompt": "How many?"},
        {"prompt": "hi", "image": f"{root}/wide.png"},
    ]
    path = as_path(root)
    remote_files.write_bytes(path / "wide.png", (tmp_path / "wide.png").read_bytes())
    remote_files.write_bytes(
        path / "q.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    settings = {
        "requests": f"{root}/q.jsonl",
        "output": f"{root}/a.jsonl",
        "max_new_tokens": 3,
        "batch_size": 1,
    }

    def answers() -> list[dict]:
        return [
            json.loads(row)
            for row in remote_files.read_bytes(path / "a.jsonl", max_bytes=1 << 20).splitlines()
        ]

    ask(**settings)
    whole = answers()
    assert [row["prompt"] for row in whole] == ["Read.", "How many?", "hi"] and whole[0][
        "tiles"
    ] == whole[2]["tiles"]
    torn = "".join(json.dumps(row) + "\n" for row in whole[:1]) + '{"id": 2, "pro'
    remote_files.write_bytes(path / "a.jsonl", torn.encode())
    ask(**settings)
    assert [row["text"] for row in answers()] == [row["text"] for row in whole]
    with pytest.raises(SystemExit, match="system is None in the file"):
        ask(**settings, system="Talk like a pirate.")


def test_what_cannot_be_reached_is_one_line(store, tmp_path):
    line = [
        sys.executable,
        str(ROOT / "infer.py"),
        f"--checkpoint=gs://{BUCKET}-of-nobody/model",
        "--prompt=hi",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and f"{BUCKET}-of-nobody/model" in done.stderr
    )
