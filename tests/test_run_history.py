"""What a run remembers: its log, cut back when it is resumed, its data, and how signals end it."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from internvl3_jax.config import ConfigError
from internvl3_jax.data.identity import DataChanged, check_identity, data_identity
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.parallel import multihost
from internvl3_jax.training import log_sinks, run_log, state, workdir
from internvl3_jax.training.guards import SkipLog
from internvl3_jax.training.history import RunHistory
from tests.support.official_data import turns, write_meta
from tests.support.tiny_checkpoint import changed, tokenizer_files, train_config

pytestmark = pytest.mark.smoke


# --- what is cut back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [run_log.LOG, run_log.ANSWERS])
def test_rows_of_steps_that_are_repeated_are_dropped(tmp_path, name):
    """With what a kill has torn, within a character too."""
    path = tmp_path / name
    run_log.append(path, [{"step": step, "answer": "größer\u2028"} for step in (2, 4, 4, 6)])
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 6, "answer": "gr\u00f6'.encode()[:-1])
    with run_log.Log(tmp_path, train_config(), 4):
        pass
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    assert [row["step"] for row in run_log.read_rows(path)] == [2, 4, 4]


def test_a_number_that_is_not_finite_leaves_the_log_readable(tmp_path):
    run_log.append(tmp_path / "log.jsonl", [{"step": 1, "loss": float("nan")}])
    assert run_log.read_rows(tmp_path / "log.jsonl") == [{"step": 1, "loss": None}]
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    with pytest.raises(FileError, match="log.jsonl line 1: is not a row of a run"):
        run_log.cut_back(tmp_path / "log.jsonl", 1)


def test_reasons_are_noted_once(tmp_path):
    """Those of steps that are repeated again when they come again, the others never again."""
    path = tmp_path / "skipped.txt"
    path.write_bytes(b"3\tearly\n5\tlate\n5\tto")
    (tmp_path / "skipped.1.txt").write_bytes(b"3\tother\n5\tgone\n")
    skipped = SkipLog(tmp_path, 4)
    assert (
        path.read_text() == "3\tearly\n"
        and (tmp_path / "skipped.1.txt").read_text() == "3\tother\n"
    )
    prepared = types.SimpleNamespace(skipped=["early", "late", "two\nlines"], skipped_count=4)
    assert skipped.note(6, prepared) == 4
    skipped.note(8, prepared)
    assert path.read_text() == "3\tearly\n6\tlate\n6\ttwo\\nlines\n"


def test_no_curve_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with run_log.Log(tmp_path, train_config(), 0) as log:
        log.write(1, {"loss": 1.0, "seconds": 1.0})
    assert "loss.png is left out, since matplotlib is not installed" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_a_package_for_the_log_is_missed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ImportError,
        match=r"logging.tensorboard=True needs tensorboardX: pip install -e '.\[logging\]', or set",
    ):
        log_sinks.check_extras(changed(train_config(), logging__tensorboard=True))
    log_sinks.check_extras(train_config())


# --- what the samples are made of ----------------------------------------------------------------


def test_changed_data_are_named(tmp_path):
    rows = [{"id": n, "conversations": turns(f"Say {n}.", f"It is {n}.")} for n in range(4)]
    data = dataclasses.replace(
        train_config().data, source=write_meta(tmp_path, text={"rows": rows})
    )
    tokenizer = Tokenizer.from_files(tokenizer_files())
    saved = json.loads(json.dumps(data_identity(data, open_sources(data), tokenizer)))
    check_identity(saved, data_identity(data, open_sources(data), tokenizer), 4, accept=False)
    write_meta(tmp_path, text={"rows": rows[::-1]})
    with pytest.raises(
        DataChanged,
        match=r"since step 4 was saved, source 'text' of .*meta.json has changed .*sha256",
    ):
        check_identity(saved, data_identity(data, open_sources(data), tokenizer), 4, accept=False)
    write_meta(tmp_path, text={"rows": rows, "repeat_time": 2})
    with pytest.raises(DataChanged, match=r"source 'text'"):
        check_identity(saved, data_identity(data, open_sources(data), tokenizer), 4, accept=False)
    write_meta(tmp_path, text={"rows": rows}, more={"rows": rows})
    with pytest.raises(
        DataChanged,
        match=r"order of the sources has changed .was: text; is: text, more.; source 'more'",
    ):
        check_identity(saved, data_identity(data, open_sources(data), tokenizer), 4, accept=False)


def test_a_step_says_what_its_data_were(tmp_path):
    """It is compared before anything of the step is read."""
    step, now = (
        tmp_path / "checkpoints" / "4",
        types.SimpleNamespace(identity={"tokenizer t": "sha256 2"}),
    )
    step.mkdir(parents=True)
    (step / "training.json").write_text(
        json.dumps({"step": 4, "identity": {"tokenizer t": "sha256 1"}})
    )
    with pytest.raises(DataChanged, match="since step 4 was saved, tokenizer t has changed"):
        state.check_data(train_config(), tmp_path, now, 4)
    state.check_data(changed(train_config(), accept_changed_data=True), tmp_path, now, 4)
    (step / "training.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(JsonError, match=r"training.json: identity is missing"):
        state.check_data(train_config(), tmp_path, now, 4)


def test_eval_losses_of_other_data_are_forgotten():
    history = RunHistory(eval_data="a.json, 8 batches")
    history.note_eval(4, 1.5)
    history.note_eval(6, 1.7)
    history.set_eval_data("a.json, 8 batches")
    assert (history.best, history.best_step) == (1.5, 4)
    history.set_eval_data("b.json, 8 batches")
    assert (history.best, history.best_step) == (math.inf, 0)
    history.note_eval(8, 2.5)
    assert (history.best, history.best_step) == (2.5, 8)


@pytest.mark.parametrize("best", [math.inf, 1.5])
def test_what_a_run_remembers_comes_back(best):
    past = RunHistory(seconds=3.0, best=best, best_step=4, frozen="x")
    assert RunHistory.of_saved(json.loads(json.dumps(past.saved(), allow_nan=False))) == past
    with pytest.raises(
        ConfigError, match="past.best_step is the text '4'; expected a whole number"
    ):
        RunHistory.of_saved(past.saved() | {"best_step": "4"})


def test_changed_tokenizer_and_drop_list_are_named(tmp_path, capsys):
    (tmp_path / "drop.tsv").write_text("# none\n")
    data = dataclasses.replace(train_config().data, exclude_file=str(tmp_path / "drop.tsv"))
    files = tokenizer_files()
    saved = data_identity(data, open_sources(data), Tokenizer.from_files(files))
    (tmp_path / "drop.tsv").write_text("digits\t3\tno\n")
    vocab = json.loads(files["vocab.json"])
    vocab["I"], vocab["n"] = vocab["n"], vocab["I"]
    now = data_identity(
        data,
        open_sources(data),
        Tokenizer.from_files(files | {"vocab.json": json.dumps(vocab).encode()}),
    )
    with pytest.raises(
        DataChanged,
        match=r"tokenizer .*tiny_digits has changed .*; data.exclude_file .*drop.tsv has changed",
    ):
        check_identity(saved, now, 4, accept=False)
    check_identity(saved, now, 4, accept=True)
    assert "resuming from step 4 with other data: tokenizer" in capsys.readouterr().out


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(number, capfd):
    with multihost.preemption_signal() as stops:
        assert not stops(1)
        os.kill(os.getpid(), number)
        assert stops(2) == number
    assert ("press Ctrl-C again to stop at once" in capfd.readouterr().err) == (
        number == signal.SIGINT
    )


def test_a_second_interrupt_ends_it_at_once():
    code = (
        "import os, signal, time\nfrom internvl3_jax.parallel.multihost import preemption_signal\n"
        "with preemption_signal():\n    [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]\n    time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(workdir.__file__).parent.parent)}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ended.returncode == multihost.INTERRUPTED == 130
    assert (
        ended.stderr.splitlines()[-1] == "stopped at once; the last complete step is kept"
        and "Traceback" not in ended.stderr
    )


def test_a_curve_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    with run_log.Log(tmp_path, train_config(), 0) as log:
        log.write(1, {"loss": 1.0, "seconds": 1.0})
    assert "loss.png is left out (" in capsys.readouterr().out
