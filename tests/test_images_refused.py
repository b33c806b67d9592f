"""What holds no image, or one that is damaged or too large, is refused in one short line."""

import contextlib
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

from internvl3_jax.data.media.images import ImageError, open_image
from tests.support.noise_images import encoded, noise


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_truncated_files_are_refused_by_name(tmp_path, file_format, kept):
    path = tmp_path / "half.any"
    data = encoded(noise(120, 90), file_format)
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=r"half\.any: .+; .+"):
        open_image(path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_damage_gives_a_image_or_an_image_error(file_format):
    data = encoded(noise(60, 40), file_format)
    rng = np.random.default_rng(5)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 400), 6):
            damaged[position] = int(rng.integers(256))
        try:
            open_image(bytes(damaged))
        except ImageError as error:
            assert "image of" in str(error)


def test_missing_file_directory_empty_file_and_text(tmp_path):
    with pytest.raises(ImageError, match=r"cat\.jpg: no such file in .*; check the path"):
        open_image(tmp_path / "cat.jpg")
    with pytest.raises(ImageError, match="is a directory; name the image inside it"):
        open_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: is empty"):
        open_image(tmp_path / "empty.png")
    (tmp_path / "notes.png").write_text("not an image at all")
    with pytest.raises(
        ImageError, match=r"notes\.png: is not an image of pixels .*; convert it to PNG or JPEG"
    ):
        open_image(tmp_path / "notes.png")
    with pytest.raises(ImageError, match="https://example.org/a.png: addresses are not fetched"):
        open_image("https://example.org/a.png")
    with pytest.raises(ImageError, match="is not a usable path"):
        open_image("a\0b.png")
    with (
        open(tmp_path / "notes.png") as file,
        pytest.raises(ImageError, match="open it in binary mode"),
    ):
        open_image(file)


def test_named_pipe_is_refused_without_waiting(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ImageError, match="is not a regular file"):
        open_image(path)


def test_things_that_are_no_source():
    with pytest.raises(ImageError, match="image of 0 bytes: is empty"):
        open_image(b"")
    for thing in (None, 7, ["a.png"]):
        with pytest.raises(ImageError, match="not something to open; give a path"):
            open_image(thing)


def test_images_without_pixels():
    for source in (
        Image.new("RGB", (0, 5)),
        Image.new("RGB", (5, 0)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(ImageError, match="has no pixels"):
            open_image(source)


@pytest.mark.parametrize("excess", [1, 2.5])
def test_decompression_bombs_are_refused(monkeypatch, excess):
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    open_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(9_999 / excess))
    with pytest.raises(
        ImageError,
        match="bomb.png: .*scale it down, or.* --max_image_pixels .*data.max_image_pixels",
    ):
        open_image(data, name="bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    open_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_where_warnings_are_only_printed(monkeypatch):
    data = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(ImageError, match="100 x 100 pixels are more than 9,999"):
        open_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_the_limit_of_pixels_is_an_argument_and_pillows_own_stays(monkeypatch, file_format):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(noise(40, 30), file_format)
    for limit in (0, 1200, 10**9):
        assert open_image(data, max_pixels=limit).size == (40, 30)
    with pytest.raises(ImageError, match="40 x 30 pixels are more than 1,199"):
        open_image(data, max_pixels=1199)
    with pytest.raises(ImageError, match="--max_image_pixels"):
        open_image(data)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_truncated_files_are_read_where_that_is_allowed(file_format):
    pixels = np.asarray(noise(120, 90))
    whole = encoded(Image.fromarray(pixels), file_format)
    part = whole[: int(len(whole) * 0.7)]
    with pytest.raises(ImageError):
        open_image(part)
    try:
        opened = np.asarray(open_image(part, allow_truncated=True))
    except ImageError:  # formats that Pillow reads whole or not at all
        assert file_format in ("WEBP", "TIFF")
    else:
        assert opened.shape == pixels.shape
        np.testing.assert_array_equal(opened[:30], np.asarray(open_image(whole))[:30])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ImageError, match="damaged or incomplete|cannot be opened"):
        open_image(part)


def test_the_remedy_for_truncated_files_is_one_that_programs_have():
    data = encoded(noise(120, 90), "JPEG")
    with pytest.raises(ImageError, match="data.allow_truncated in training, --allow_truncated"):
        open_image(data[: len(data) // 2])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 64 64 rectfill\nshowpage\n"
NO_PIXELS = {
    "eps": POSTSCRIPT,
    "eps with a preview": struct.pack("<I6I2x", 0xC6D3D0C5, 32, len(POSTSCRIPT), 0, 0, 0, 0).ljust(
        32, b"\0"
    )
    + POSTSCRIPT,
    "ps": b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "pdf": b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n",
    "wmf": b"\xd7\xcd\xc6\x9a\0\0"
    + struct.pack("<4hH", 0, 0, 100, 100, 1440)
    + b"\0" * 6
    + b"\1\0\x09\0"
    + b"\0" * 40,
    "emf": struct.pack("<10i", 1, 108, 0, 0, 100, 100, 0, 0, 2540, 2540) + b" EMF" + b"\0" * 60,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}


@pytest.mark.parametrize("kind", NO_PIXELS)
def test_what_other_programs_would_draw_is_refused_and_no_program_is_started(
    tmp_path, monkeypatch, kind
):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: started.append(arguments))
    path = tmp_path / "cat.jpg"
    path.write_bytes(NO_PIXELS[kind])
    for source in (path, NO_PIXELS[kind]):
        with pytest.raises(ImageError, match="is not an image of pixels"):
            open_image(source)
    with contextlib.suppress(UnidentifiedImageError, OSError), Image.open(path) as lazy:
        with pytest.raises(ImageError, match="not an image of pixels"):
            open_image(lazy)
    assert not started


@pytest.mark.parametrize(
    "name",
    [
        "data:image/png;base64," + "A" * 2_000_000,
        "x" * 5_000,
        "dir/" * 2_000 + "a.png",
        "https://a.org/" + "b" * 9_000,
    ],
    ids=lambda name: name[:9],
)
def test_errors_quote_long_names_in_short(name):
    with pytest.raises(ImageError) as error:
        open_image(name)
    assert len(str(error.value)) < 600 and name[:9] in str(error.value)


def test_names_cannot_drive_the_terminal(tmp_path):
    path = tmp_path / "a\x1b]52;c;eA==\x07\n.png"
    path.write_text("no image")
    with pytest.raises(ImageError) as error:
        open_image(path)
    assert (
        "\x1b" not in str(error.value)
        and "\n" not in str(error.value)
        and "\\x1b" in str(error.value)
    )


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"<html><body>", "web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    ],
)
def test_what_was_stored_in_place_of_an_image_is_named(content, advice):
    with pytest.raises(ImageError, match=f"is not an image .*{advice}"):
        open_image(content)
