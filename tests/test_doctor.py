"""The doctor finds one of each defect and no more, and training refuses what it found until it is
resolved.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.doctor.command import main, read_processor
from internvl3_jax.data.doctor.examine import examine
from internvl3_jax.data.doctor.report import UnresolvedErrors, check_report, report_folder
from internvl3_jax.data.doctor.table import rows_of
from internvl3_jax.data.pipeline import sample_dataset
from tests.support import tiny_checkpoint
from tests.support.official_data import (
    PROCESSOR,
    data_config,
    make_image,
    tokenizer,
    turns,
    write_meta,
    write_video,
)

TEXT = {"conversations": turns("hi", "ho")}
DEFECTS = [
    ("{", "is not JSON"),
    ({"image": "gone.png", **TEXT}, "no such file"),
    ({"image": "broken.png", **TEXT}, "broken.png: "),
    (
        {"image": ["a.png", "a.png"], "conversations": turns("<image>", "ho")},
        "2 images, but 1 <image> tags",
    ),
    ({"image": ["a.png", "a.png"], **TEXT}, "2 images, but 0 <image> tags"),
    (
        {"conversations": [*turns("hi"), *turns("hi", "ho")]},
        "is the user's where the assistant's was expected",
    ),
    ({"conversations": turns("hi")}, "nothing to learn"),
    ({"conversations": turns("long " * 200, "ho")}, "tokens, a row holds 200"),
    ({"video": "gone.mp4", **TEXT}, "no such file"),
    ({"video": "a.mp4", "clip": [5, 6], **TEXT}, "holds no frame"),
    ({"video": "long.mp4", **TEXT}, "10 tiles, a row holds 8"),
]


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """A meta JSON with a source of every defect between healthy rows, and one that is healthy."""
    folder = tmp_path_factory.mktemp("ward")
    make_image(40, 20).save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    write_video(folder / "a.mp4", 6)
    write_video(folder / "long.mp4", 30)
    rows = [row for defect, _ in DEFECTS for row in ({"id": "same", **TEXT}, defect)]
    good = [{"id": 1, "image": "a.png", **TEXT}, {"id": 2, **TEXT}, {"image": "gone.png", **TEXT}]
    return write_meta(
        folder, sick={"rows": rows}, good={"rows": good, "repeat_time": 0.7, "length": 4}
    )


CHANGES = {"tokens_per_row": 200, "tiles_per_row": 8, "max_frames": 10, "min_frames": 1}


@pytest.fixture(scope="module")
def report(ward):
    return examine(
        data_config(ward, **CHANGES), PROCESSOR, tokenizer(), report_folder(ward), workers=0
    )


def test_each_defect_is_found(ward, report):
    sick, good = report["sources"]["sick"], report["sources"]["good"]
    assert (sick["rows"], sick["errors"], good["rows"], good["errors"]) == (22, len(DEFECTS), 2, 0)
    folder = pathlib.Path(report_folder(ward))
    found = [line.split("\t") for line in (folder / "errors.tsv").read_text().splitlines()[1:]]
    assert [(source, int(row)) for source, row, _ in found] == [
        ("sick", 2 * number + 1) for number in range(len(DEFECTS))
    ]
    for (_, _, reason), (_, expected) in zip(found, DEFECTS, strict=True):
        assert expected in reason
    assert sick["first_duplicate_ids"] == {"same": 11} and good["duplicate_ids"] == 0
    assert good["tiles"]["sum"] == 3 and good["images"] == 1 and good["tokens"]["max"] < 60
    assert [
        "length is 4, but the annotation has 3 rows" in warning for warning in report["warnings"]
    ] == [True]
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (folder / "histogram.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_an_epoch(report):
    """The budget that runs out first counts; the settings of a converted checkpoint are its own."""
    sources = report["sources"].values()
    tokens, tiles = (sum(source[name]["sum"] for source in sources) for name in ("tokens", "tiles"))
    assert rows_of(report) == max(-(-tokens // 200), -(-tiles // 8)) > 1
    checkpoint = str(tiny_checkpoint.directory())
    assert read_processor(checkpoint, None) == tiny_checkpoint.PROCESSOR
    assert read_processor(checkpoint, 3) == dataclasses.replace(
        tiny_checkpoint.PROCESSOR, max_tiles=3
    )
    assert read_processor("elsewhere", None) == ProcessorConfig()


def test_workers_find_the_same(ward, report, tmp_path):
    again = examine(data_config(ward, **CHANGES), PROCESSOR, tokenizer(), str(tmp_path), workers=2)
    assert again["sources"] == report["sources"]


def test_long_samples_are_warnings_where_they_are_cut_or_dropped(ward, tmp_path):
    for rule in ("truncate", "drop"):
        config = data_config(ward, overlong=rule, **CHANGES)
        sick = examine(config, PROCESSOR, tokenizer(), str(tmp_path))["sources"]["sick"]
        assert (sick["errors"], sick["shortened_or_dropped"]) == {
            "truncate": (11, 0),
            "drop": (9, 2),
        }[rule]


@pytest.mark.filterwarnings("ignore:.*length is 4")
def test_training_refuses_until_errors_are_resolved(ward, report, tmp_path):
    config = data_config(ward, **CHANGES)
    with pytest.raises(
        UnresolvedErrors,
        match=r"names 11 samples that cannot be used, the first: sick row 1: is not JSON",
    ):
        sample_dataset(config, PROCESSOR, tokenizer())
    errors = f"{report_folder(ward)}/errors.tsv"
    lines = pathlib.Path(errors).read_text().splitlines()
    (tmp_path / "some.tsv").write_text("\n".join(lines[:-1]))
    with pytest.raises(UnresolvedErrors, match=r"names 1 samples .* sick row 21"):
        check_report(data_config(ward, exclude_file=str(tmp_path / "some.tsv")))
    dataset = sample_dataset(
        data_config(ward, exclude_file=errors, **CHANGES), PROCESSOR, tokenizer()
    )
    assert not any("error" in dataset[index] for index in range(30))
    dataset = sample_dataset(
        data_config(ward, on_bad_sample="skip", **CHANGES), PROCESSOR, tokenizer()
    )
    assert any("error" in dataset[index] for index in range(30))


def test_the_program(tmp_path, capsys):
    for name, content in tokenizer().files().items():
        (tmp_path / name).write_bytes(content)
    make_image(900, 450).save(tmp_path / "a.png")
    meta = write_meta(tmp_path, good={"rows": [{"image": "a.png", **TEXT}] * 3})
    options = ["--tokenizer", str(tmp_path), "--tokens_per_row", "2000", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "internvl3_jax.data.doctor", meta, *options],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(pathlib.Path(meta + ".doctor", "report.json").read_text())
    assert "0 errors" in done.stdout and report["sources"]["good"]["tiles"]["sum"] == 9
    assert (
        main(
            [
                meta,
                *options[:2],
                "--max_tiles",
                "1",
                "--tokens_per_row",
                "100",
                "--report",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert "3 errors" in capsys.readouterr().out and (tmp_path / "out" / "errors.tsv").exists()
    assert main([str(tmp_path / "none.json"), *options[:2]]) == 1
    assert "none.json" in capsys.readouterr().err
