"""What images cost: the pure functions and the command line."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from internvl3_jax.config import UNITS, ProcessorConfig
from internvl3_jax.data.media.tiles import count_tiles
from internvl3_jax.data.tokens import (
    RELEASED_SIZES,
    ImageCost,
    cache_bytes_per_token,
    image_cost,
    main,
    prompt_report,
)
from internvl3_jax.positions import build_positions
from internvl3_jax.sizes import SIZES

PROCESSOR = ProcessorConfig()
TINY = ProcessorConfig(image_size=32, tokens_per_tile=16)


def run(capsys, *arguments):
    status = main(["tokens", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_cost_of_a_screen():
    assert image_cost(1920, 1080, PROCESSOR) == ImageCost(1920, 1080, 4, 2, 9, 2304, 2306, 2306)
    assert image_cost(1920, 1080, PROCESSOR, delta=64).positions == 2304 // 4 + 2
    assert image_cost(1920, 1080, PROCESSOR, max_tiles=1) == ImageCost(
        1920, 1080, 1, 1, 1, 256, 258, 258
    )
    assert image_cost(1920, 1080, dataclasses.replace(PROCESSOR, delta=128)).positions == 1152 + 2


def test_cost_of_a_image_that_cannot_be():
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        image_cost(0, 3, PROCESSOR)


def test_positions_agree_with_the_positions_of_a_sequence():
    rng = np.random.default_rng(0)
    for processor in (PROCESSOR, TINY):
        for _ in range(50):
            width, height, max_tiles = (
                int(rng.integers(1, 3000)),
                int(rng.integers(1, 3000)),
                int(rng.integers(1, 13)),
            )
            delta = int(rng.integers(1, UNITS + 1))
            cost = image_cost(width, height, processor, max_tiles, delta)
            assert cost.tiles == count_tiles(width, height, processor, max_tiles)
            assert (
                cost.tokens == cost.visual_tokens + 2 == cost.tiles * processor.tokens_per_tile + 2
            )
            # One text token before <img>, so that the token after </img> is as far from it as the
            # image and one step.
            positions = build_positions(cost.tokens + 2, [(2, cost.visual_tokens)], [delta])
            assert positions[-1] - positions[0] == (cost.positions + 1) * UNITS


def test_cache_bytes_equal_a_count_of_every_number():
    language = SIZES["8b"].language
    keys = language.num_layers * language.num_kv_heads * language.head_dim
    assert cache_bytes_per_token(language) == 28 * 4 * 128 * 2 * 2 == 4 * keys
    assert cache_bytes_per_token(language, bytes_per_value=4) == 2 * cache_bytes_per_token(language)
    assert cache_bytes_per_token(SIZES["1b"].language) == 12_288


def test_report_shares_the_limit_among_images():
    report = prompt_report(
        [("a", 1920, 1080), ("b", 448, 448)], ["1b", "78b"], 12, 64, 10, "shared"
    )
    assert report["tile_rule"] == "shared" and report["max_tiles_per_image"] == 6
    assert [image["tiles"] for image in report["images"]] == [3, 1]
    assert report["prompt_tokens"] == 10 + (3 * 256 + 2) + (256 + 2)
    assert report["positions"] == 10 + (3 * 64 + 2) + (64 + 2)
    assert report["delta"] == "1/4"
    assert report["kv_cache"]["1b"]["bytes"] == report["prompt_tokens"] * 12_288
    assert list(report["kv_cache"]) == ["1b", "78b"]


@pytest.mark.parametrize(
    ("options", "tiles", "words"),
    [
        ([], [13] * 4, "12 tiles for each image, thumbnails apart"),
        (["--tiles=shared"], [1] * 4, "12 tiles shared by all images, thumbnails apart"),
        (
            ["--tiles=per_image", "--max_total_tiles=24"],
            [7] * 4,
            "12 tiles for each image, at most 24 in all, thumbnails apart",
        ),
    ],
)
def test_the_rule_of_tiles_is_named(capsys, options, tiles, words):
    sizes = ["1600x1200"] * 4
    report = json.loads(run(capsys, *sizes, *options, "--json")[1])
    assert [image["tiles"] for image in report["images"]] == tiles
    assert f"tile rule: {words}" in run(capsys, *sizes, *options)[1]


def test_limits_of_files(tmp_path, capsys):
    path = tmp_path / "large.png"
    Image.new("L", (100, 100)).save(path)
    status, _, error = run(capsys, str(path), "--max_image_pixels=9999")
    assert status == 2 and "--max_image_pixels" in error and error.count("\n") == 1
    assert run(capsys, str(path), "--max_image_pixels=0")[0] == 0
    Image.effect_noise((100, 100), 90).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:3000])
    assert "--allow_truncated" in run(capsys, str(path))[2]
    assert run(capsys, str(path), "--allow_truncated")[0] == 0


def test_report_for_tiny_uses_its_own_tiles():
    report = prompt_report([("a", 64, 64)], ["tiny"], 12, UNITS, 0)
    assert (
        report["images"][0]["visual_tokens"]
        == report["images"][0]["tiles"] * SIZES["tiny"].tokens_per_tile
    )


def test_json(tmp_path, capsys):
    path = tmp_path / "image.png"
    Image.new("RGB", (896, 448)).save(path)
    status, out, _ = run(
        capsys,
        str(path),
        "100x50",
        "--json",
        "--delta",
        "1/4",
        "--size=1b,8b",
        "--text_tokens",
        "20",
    )
    assert status == 0 and out.count("\n") == 1
    report = json.loads(out)
    assert [image["name"] for image in report["images"]] == [str(path), "100x50"]
    assert (report["images"][0]["columns"], report["images"][0]["rows"]) == (2, 1)
    assert report["text_tokens"] == 20 and list(report["kv_cache"]) == ["1b", "8b"]


def test_table_is_plain_text_where_nobody_watches(capsys):
    status, out, _ = run(capsys, "1920x1080", "--delta=1/4")
    assert status == 0 and out.isascii() and "\x1b" not in out
    assert "1920 x 1080  4 x 2      9          2,304   2,306        578" in out
    assert "at delta 1/4" in out
    for size in RELEASED_SIZES:
        assert f"\n{size} " in out
    assert "tiny" not in out


def test_names_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("[red] :cat:.png")
    assert "[red] :cat:.png" in run(capsys, "[red] :cat:.png")[1]


def test_a_file_named_like_a_size_is_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 10)).save("5x7", "PNG")
    assert json.loads(run(capsys, "5x7", "--json")[1])["images"][0]["width"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], r"missing.png: no such file"),
        (["10x10", "--delta", "1/3"], "multiple of 1/256"),
        (["10x10", "--size", "3b"], "unknown size '3b'; choose from tiny, 1b"),
        (["10x10", "--size", "tiny,1b"], "cut images into different tiles"),
        (["10x10", "--max_tiles", "0"], "max_tiles=0"),
        (["10x10", "--max_tile", "3"], "Unknown command line flag 'max_tile'"),
        (["0x10"], "0 x 10 pixels"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, message):
    status, out, error = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert error.startswith("tokens: ") and message in error


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "--max_tiles" in out
    status, out, error = run(capsys)
    assert status == 2 and out == "" and "--text_tokens" in error


def test_command_never_imports_jax():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['tokens', '640x480', '--json']\n"
        "try:\n    runpy.run_module('internvl3_jax.data.tokens', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "heavy = [name for name in ('jax', 'jaxlib', 'flax', 'torch', 'transformers') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == 64 + 13 * 256 + 2
