"""What a run shows of its progress: the same columns in a terminal and without one."""

import io
import sys
import warnings

import pytest

from internvl3_jax.training import console, loss_curve
from internvl3_jax.training.console import Console, duration

pytestmark = pytest.mark.smoke
ROW = {
    "loss": 0.15264,
    "learning_rate": 0.001794,
    "tokens_per_second": 4921.4,
    "step_seconds": 0.2953,
    "mfu": 0.4123,
    "input_wait": 0.01,
    "seconds": 118.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Sets the seconds since the run began."""
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_line_has_percent_rest_and_units(capsys, clock):
    shown = Console(1700, 300)
    clock(50.0)
    shown.start_clock()
    clock(80.0)
    shown.update(400, ROW)
    assert capsys.readouterr().out == (
        "step 400/1700 23.5% | ETA 6m30s | loss 0.1526 | lr 1.79e-03 | 4,921 tokens/s | "
        "0.295 s/step | MFU 41.2%\n"
    )
    shown.update(1700, ROW | {"input_wait": 0.08, "skipped": 1200})
    out = capsys.readouterr().out
    assert "ETA" not in out
    assert out.endswith("| waiting for data 8% | 1,200 samples skipped\n")


def test_an_evaluation_has_a_line_and_then_a_column(capsys, clock):
    shown = Console(30, 0)
    shown.update(10, {"eval_loss": 0.20113, "eval_loss/text": 0.2, "eval_reward_margin": 0.51})
    assert capsys.readouterr().out == "step 10/30 | eval loss 0.2011 | eval margin 0.51\n"
    clock(20.0)
    shown.update(20, {"loss": 0.7, "reward_margin": 0.4216, "reward_accuracy": 0.6875})
    assert capsys.readouterr().out == (
        "step 20/30 66.7% | ETA 10s | loss 0.7 | margin 0.422 | accuracy 68.8% | "
        "eval loss 0.2011 (step 10)\n"
    )


def test_a_terminal_shows_the_same_columns(monkeypatch, clock):
    """Below a bar; lines of text come above it, and a narrow terminal wraps them."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(terminal):
        clock(0.0)
        monkeypatch.setattr(sys, "stdout", terminal)
        with Console(30, 0) as shown:
            shown.say("compiled in [bold]3.0[/bold] s")
            clock(20.0)
            shown.update(20, ROW)
        return terminal.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    plain, terminal = shown(io.StringIO()), shown(Terminal())
    line = plain.splitlines()[-1]
    assert line.startswith("step 20/30 66.7% | ETA 10s | loss") and line in terminal
    assert "compiled in [bold]3.0[/bold] s" in terminal and "training" in terminal
    assert "training" not in plain


def test_a_process_that_does_not_write_shows_nothing(capsys):
    with Console(30, 0, enabled=False) as shown:
        shown.say("compiling")
        shown.update(20, ROW)
    assert capsys.readouterr().out == ""


def test_a_warning_of_ours_is_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    console.shorten_warnings()
    assert warnings.formatwarning("length is 3", UserWarning, "a.py", 7) == "warning: length is 3\n"
    assert "a.py:7" in warnings.formatwarning("old", DeprecationWarning, "a.py", 7, "")


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0s"), (45, "45s"), (389.4, "6m29s"), (3600, "1h00m"), (11_250, "3h07m"),
    (187_200, "2d04h"),
])  # fmt: skip
def test_times_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_the_curve_has_whole_steps_and_a_linear_axis(monkeypatch):
    figures = []
    figure = pytest.importorskip("matplotlib.figure")
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    rows = [{"step": step, "loss": 5.4 / step} for step in (1, 2, 3)]
    rows += [{"step": 3, "eval_loss": 1.5}, {"step": 4, "loss": None}]
    assert loss_curve.draw_losses(rows).startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_yscale() == "linear" and len(axes.lines) == 2
    assert all(tick == round(tick) for tick in axes.get_xticks())
