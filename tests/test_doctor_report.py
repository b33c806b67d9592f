"""What the doctor's report says and where it goes: names of every kind, narrow terminals, older
reports and wrong options.
"""

import json
import pathlib
import sys
import types

import numpy as np
import pytest

from internvl3_jax.data.doctor.command import find_tokenizer, main
from internvl3_jax.data.doctor.report import check_report, integer_bins
from tests.support import tiny_checkpoint
from tests.support.official_data import (
    data_config,
    make_image,
    tokenizer,
    turns,
    write_meta,
    write_rows,
)

TEXT = {"conversations": turns("hi", "ho")}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A directory with a tokenizer's files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer().files().items():
        (folder / name).write_bytes(content)
    return str(folder)


def doctor(meta: str, tokens: str, *options: str) -> int:
    return main([meta, "--tokenizer", tokens, "--tokens_per_row", "2000", *options])


def test_names_of_every_kind(tmp_path, tokens, capsys, monkeypatch):
    """Brackets are no markup, escapes reach no terminal, file names that are not UTF-8 are an error
    of their row, errors are short.
    """
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "data [v2] [red]"
    folder.mkdir()
    rows = [
        {"id": "caf\udce9", **TEXT},
        {"image": "caf\udce9.png", **TEXT},
        {"image": "\x1b[2J\x1b]52;c;cHduZWQ=\x07\u202e.png", **TEXT},
        {"image": "data:image/png;base64," + "A" * 2_000_000, **TEXT},
        {"image": {"bytes": "A" * 2_000_000}, **TEXT},
        {"\x1b[2Jimages" * 9: ["a"], "images": ["a\nb.png"], **TEXT},
    ]
    write_rows(folder / "a.jsonl", [TEXT])
    entry = {"annotation": "a.jsonl"}
    meta = write_meta(
        folder, **{"chart[/zh]": entry, "vqa[train]": {"rows": rows}, "größe 中文": entry}
    )
    assert doctor(meta, tokens) == 1
    shown = capsys.readouterr().out
    assert all(
        name in shown
        for name in (
            "chart[/zh]",
            "vqa[train]",
            "größe 中文",
            "data [v2] [red]",
            "\\x1b[2J",
            "caf\\udce9",
        )
    )
    assert "\x1b" not in shown and "\u202e" not in shown and len(shown) < 6000
    report = json.loads(pathlib.Path(meta + ".doctor", "report.json").read_text(encoding="utf-8"))
    assert report["sources"]["vqa[train]"]["errors"] == 5
    lines = pathlib.Path(meta + ".doctor", "errors.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[:2] for line in lines[1:]] == [
        ["vqa[train]", str(row)] for row in range(1, 6)
    ]
    assert max(map(len, lines)) < 1100
    check_report(data_config(meta, exclude_file=meta + ".doctor/errors.tsv"))


def test_what_the_doctor_says_of_answers_and_pairs(tmp_path, tokens, capsys):
    rows = [
        TEXT,
        {"conversations": turns("hi", " ")},
        {"question": "a", "chosen": "b", "rejected": "c"},
    ]
    meta = write_meta(tmp_path, a={"rows": rows})
    assert doctor(meta, tokens) == 1
    shown = capsys.readouterr().out
    assert (
        "warning: a: 1 row with an empty answer, the first: row 1" in shown
        and "run the doctor with --pairs" in shown
    )
    assert f"1 error, listed in {meta}.doctor/errors.tsv; fix the rows, or" in shown
    meta = write_meta(tmp_path, a={"rows": rows[:1]})
    assert doctor(meta, tokens) == 0
    shown = capsys.readouterr().out
    assert "0 errors\n" in shown and "listed in" not in shown


def test_tags_that_stay_text_are_counted(tmp_path, tokens, capsys):
    make_image(20, 20).save(tmp_path / "a.png")
    rows = [
        TEXT,
        {"conversations": turns("Write <image> here", "ho")},
        {"conversations": turns("hi", "<image>")},
        {"conversations": turns("<video> and <image>", "ho")},
        {"image": "a.png", "conversations": turns("<image>", "ho", "a second <image>", "ho")},
        {"image": "a.png", "conversations": turns("<image>", "ho")},
    ]
    meta = write_meta(tmp_path, a={"rows": rows})
    assert doctor(meta, tokens) == 0
    assert "a: 3 rows with <image> or <video> in the text and no image" in capsys.readouterr().out
    report = json.loads(pathlib.Path(meta + ".doctor", "report.json").read_text())
    assert report["sources"]["a"]["first_literal_tags"] == [1, 3, 4]


def test_the_table_is_legible_at_80_columns(tmp_path, tokens, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    make_image(20, 20).save(tmp_path / "a.png")
    row = {"id": "same", "image": "a.png", **TEXT}
    name = "a_source_of_a_long_name_" * 3
    meta = write_meta(tmp_path, **{name: {"rows": [row] * 1200}})
    assert doctor(meta, tokens, "--workers", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    (numbers,) = [line.split()[1:] for line in lines if "1,200  " in line]
    assert numbers == ["1,200", "0", "1,200", "434", "434", "1.0", "1"]
    assert (
        f"warning: {name}: 1 id that occurs more than once, such as 'same' (1,200 times)" in lines
    )


def test_bins_hold_whole_numbers():
    for low, high in ((1, 1), (1, 13), (0, 59), (3, 64), (0, 16384)):
        edges = integer_bins(np.array([low, high]))
        width = edges[1] - edges[0]
        assert (np.diff(edges) == width).all() and width == -(-(high - low + 1) // 60)
        assert len(edges) <= 61 and edges[0] == low - 0.5 and high < edges[-1] <= high + width
    assert integer_bins(np.array([], np.int64)).tolist() == [-0.5, 0.5]


def test_the_tile_rule_is_printed_and_followed(tmp_path, tokens, capsys):
    make_image(900, 450).save(tmp_path / "a.png")
    meta = write_meta(
        tmp_path,
        a={"rows": [{"image": ["a.png"] * 2, "conversations": turns("<image><image>", "ho")}]},
    )
    for rule, tiles, words in (
        ("shared", 2, "of a sample share 2 tiles"),
        ("per image", 6, "have each 2 tiles"),
    ):
        assert doctor(meta, tokens, "--tiles", rule, "--max_tiles", "2") == 0
        shown = capsys.readouterr().out
        assert f"tiles: {rule}" in shown and words in shown
        report = json.loads(pathlib.Path(meta + ".doctor", "report.json").read_text())
        assert report["sources"]["a"]["tiles"]["sum"] == tiles


def test_the_report_is_tried_before_the_work(tmp_path, tokens, capsys, monkeypatch):
    meta = write_meta(tmp_path, a={"rows": [TEXT]})
    # it must not come to this
    monkeypatch.setattr("internvl3_jax.data.doctor.examine.Examiner.examine", None)
    (tmp_path / "file").write_text("mine")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "report.json").write_text('{"mine": 1}')
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn/histogram.png").write_bytes(b"mine")
    for folder, reason in [
        (tmp_path / "file/rep", "Not a directory"),
        (tmp_path / "file", "the report cannot be written there"),
        (theirs, "report.json: was not written by the doctor; name another folder with --report"),
        (tmp_path / "drawn", "histogram.png: was not written by the doctor"),
        (pathlib.Path("/proc/none"), "the report cannot be written there"),
    ]:
        assert doctor(meta, tokens, "--report", str(folder)) == 1
        shown = capsys.readouterr()
        assert reason in shown.err and str(folder) in shown.err and shown.err.count("\n") == 1
    assert (theirs / "report.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "drawn/histogram.png").read_bytes() == b"mine"


def test_a_report_replaces_an_older_one_and_needs_no_matplotlib(
    tmp_path, tokens, capsys, monkeypatch
):
    meta = write_meta(tmp_path, a={"rows": [TEXT]})
    assert doctor(meta, tokens) == 0
    (tmp_path / "meta.json.doctor/report.json").unlink()  # killed before its end
    assert doctor(meta, tokens) == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert doctor(meta, tokens, "--report", str(tmp_path / "new")) == 0
    assert (
        "warning: histogram.png is left out: matplotlib is not installed" in capsys.readouterr().out
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "errors.tsv",
        "report.json",
    ]


def test_a_row_that_trips_a_decoder_is_an_error_of_that_row(tmp_path, tokens, capsys, monkeypatch):
    def trip(self, source, row, rng):
        raise {0: ZeroDivisionError, 1: MemoryError, 2: KeyError}[row]("oh\x1b")

    monkeypatch.setattr("internvl3_jax.data.example.ExampleBuilder.read", trip)
    assert doctor(write_meta(tmp_path, a={"rows": [TEXT] * 3}), tokens) == 1
    shown = capsys.readouterr().out
    assert all(
        f"a row {row}: {name}: " in shown
        for row, name in enumerate(("ZeroDivisionError", "MemoryError", "KeyError"))
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--max_tiles", "0"],
        ["--tokens_per_row", "x"],
        ["--max_tiles", "1000000000"],
        ["--tile", "x"],
    ],
)
def test_wrong_options(tmp_path, tokens, capsys, options):
    with pytest.raises(SystemExit) as caught:
        doctor(write_meta(tmp_path, a={"rows": [TEXT]}), tokens, *options)
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and options[0] in shown and shown.count("\n") == 1


def test_the_tokenizer_is_found_as_checkpoints_are(tmp_path, tokens, capsys):
    """A directory of a tokenizer, a checkpoint, a run's newest step, the examples' released model."""
    checkpoint = tiny_checkpoint.directory()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "3").symlink_to(checkpoint)
    released = pathlib.Path(__file__).resolve().parents[1] / "examples/tiny_digits"
    assert find_tokenizer(tokens) == pathlib.Path(tokens)
    assert (
        find_tokenizer(str(run)) == run / "checkpoints/3"
        and find_tokenizer(str(released)) == released
    )
    meta = write_meta(tmp_path, a={"rows": [TEXT]})
    assert doctor(meta, str(tmp_path / "nowhere")) == 1
    assert "nowhere does not exist; give a checkpoint directory" in capsys.readouterr().err


def test_a_matplotlib_that_cannot_draw_leaves_the_report(tmp_path, tokens, monkeypatch, capsys):
    """As with another version's numpy, or a backend that is not there."""

    def broken(*arguments, **options):
        raise AttributeError("module 'numpy' has no attribute 'x'")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=broken))
    meta = write_meta(tmp_path, good={"rows": [TEXT]})
    assert doctor(meta, tokens) == 0
    assert "histogram.png is left out: matplotlib cannot draw it" in capsys.readouterr().out
    assert json.loads(pathlib.Path(meta + ".doctor", "report.json").read_text())["errors"] == 0


def test_names_are_no_emoji(tmp_path, tokens, capsys):
    meta = write_meta(tmp_path, **{"s:smile:t": {"rows": [{**TEXT, "conversations": []}]}})
    assert doctor(meta, tokens) == 1
    assert "s:smile:t row 0: " in capsys.readouterr().out
