"""Opening pictures of every kind, and refusing those that hold none."""

import contextlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, UnidentifiedImageError

from internvl3_jax.data.media.images import ImageError, open_image


def noise(width=40, height=30, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def assert_same(image, expected):
    assert image.mode == "RGB" and type(image) is Image.Image
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "JPEG", "WEBP", "TIFF", "GIF", "PPM"])
def test_every_way_of_passing_a_picture(tmp_path, file_format):
    data = encoded(noise(), file_format)
    with Image.open(io.BytesIO(data)) as lazy:
        expected = lazy.convert("RGB")
    path = tmp_path / "picture.any"
    path.write_bytes(data)
    assert_same(open_image(path), expected)
    assert_same(open_image(str(path)), expected)
    assert_same(open_image(data), expected)
    assert_same(open_image(io.BytesIO(data)), expected)
    with open(path, "rb") as file:
        file.read(3)  # reading starts at the beginning all the same
        assert_same(open_image(file), expected)
        assert not file.closed
    with Image.open(path) as lazy:
        assert_same(open_image(lazy), expected)
    assert_same(open_image(np.asarray(expected)), expected)


def test_result_shares_nothing_with_the_source():
    source = noise()
    result = open_image(source)
    result.putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "PA", "La", "RGBa"]
)
def test_modes_convert_as_pillow_does(mode):
    image = noise()
    if mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    elif mode == "PA":
        image = image.convert("P")
    image = image.convert(mode)
    assert image.mode == mode
    try:
        expected = image.convert("RGB")
    except ValueError:
        with pytest.raises(ImageError, match=mode):
            open_image(image)
    else:
        assert_same(open_image(image), expected)


def test_transparency_is_dropped_not_blended():
    image = noise(channels=4)
    image.putpixel((3, 4), (200, 100, 50, 0))
    assert open_image(encoded(image)).getpixel((3, 4)) == (200, 100, 50)


@pytest.mark.parametrize("transparency", [5, bytes(range(256))])
def test_palette_with_transparency_keeps_its_colours_and_does_not_warn(transparency):
    image = noise().quantize(64)
    data = encoded(image, transparency=transparency)
    with Image.open(io.BytesIO(data)) as lazy:
        assert "transparency" in lazy.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(data)
    assert_same(opened, image.convert("RGB"))


def test_transparent_palette_picture_is_left_as_it_was():
    image = noise().quantize(64)
    image.info["transparency"] = bytes(64)
    assert_same(open_image(image), noise().quantize(64).convert("RGB"))
    assert image.info["transparency"] == bytes(64)


@pytest.mark.parametrize("source", ["PNG", "TIFF", "PPM", "array", "PIL"])
def test_16_bit_grey_keeps_the_high_byte(source):
    values = np.array([[0, 1, 255, 256, 511], [512, 4095, 32768, 65280, 65535]], np.uint16)
    image = Image.fromarray(values)
    picture = {"array": values, "PIL": image}.get(source)
    picture = encoded(image, source) if picture is None else picture
    expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert_same(open_image(picture), expected)


def test_16_bit_big_endian_grey():
    values = np.array([[256, 65535, 511]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    assert_same(
        open_image(image), np.repeat(np.array([[1, 255, 1]], np.uint8)[:, :, None], 3, axis=2)
    )


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floating point")]
)
def test_values_of_unknown_range_are_refused(tmp_path, dtype, kind):
    image = Image.fromarray(np.ones((3, 4), dtype))
    path = tmp_path / "depth.tiff"
    image.save(path)
    for source in (image, path, encoded(image, "TIFF")):
        with pytest.raises(ImageError, match=f"{kind}.* unknown range; scale them to 0..255"):
            open_image(source)
    with pytest.raises(ImageError, match="depth.tiff"):
        open_image(path)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)])
def test_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.broadcast_to(array.reshape(5, 6, -1)[:, :, :3], (5, 6, 3))
    assert_same(open_image(array), expected)
    assert_same(open_image(np.asfortranarray(array)), expected)
    assert_same(open_image(array[::-1, ::2]), expected[::-1, ::2])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 5, 6), np.uint8),
        np.zeros((5, 6, 3)),
        np.zeros((5, 6, 2), np.uint8),
        np.zeros(5),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(
        ImageError, match=r"array .*\[.*\]: is no image array; give uint8 \[height, width, 3\]"
    ):
        open_image(array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_ignored_unless_asked_for(file_format, orientation):
    upright = noise(8, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(upright, file_format, exif=exif, **options)
    stored = np.asarray(open_image(encoded(upright, file_format, **options)))
    assert stored.shape == (6, 8, 3)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    assert_same(open_image(data, apply_exif=True), turned)
    # Pillow turns TIFF files as it loads them
    assert_same(open_image(data), turned if file_format == "TIFF" else stored)


def test_exif_orientation_of_16_bit_grey():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 256
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(values), "PNG", exif=exif)
    expected = np.repeat(np.rot90((values >> 8).astype(np.uint8), -1)[:, :, None], 3, axis=2)
    assert_same(open_image(data, apply_exif=True), expected)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken_unless_one_is_chosen(file_format):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert_same(open_image(data), frames[0])
    for index, frame in enumerate(frames):
        assert_same(open_image(data, frame=index), frame)
    for index in (3, -1):
        with pytest.raises(ImageError, match=f"has no frame {index}; choose from 0 to 2"):
            open_image(data, frame=index)
    with Image.open(io.BytesIO(data)) as lazy:  # its owner has chosen the frame
        lazy.seek(1)
        assert_same(open_image(lazy), frames[1])


def test_frame_of_a_single_picture():
    assert_same(open_image(encoded(noise()), frame=0), noise())
    with pytest.raises(ImageError, match="has no frame 1"):
        open_image(encoded(noise()), frame=1)


def test_photograph_with_a_preview_is_one_picture():
    main, preview = noise(64, 48), noise(16, 12, seed=1)
    data = encoded(main, "MPO", save_all=True, append_images=[preview])
    with Image.open(io.BytesIO(data)) as lazy:
        assert lazy.format == "MPO" and lazy.n_frames == 2
        expected = lazy.convert("RGB")
    assert_same(open_image(data), expected)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_truncated_files_are_refused_by_name(tmp_path, file_format, kept):
    path = tmp_path / "half.any"
    data = encoded(noise(120, 90), file_format)
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=r"half\.any: .+; .+"):
        open_image(path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_damage_gives_a_picture_or_an_image_error(file_format):
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
    (tmp_path / "notes.png").write_text("not a picture at all")
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


def test_pictures_without_pixels():
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


def png_with(chunk, content, after_pixels=False):
    """A PNG of noise with one more chunk."""
    data = encoded(noise())
    place = len(data) - 12 if after_pixels else 33
    return (
        data[:place]
        + struct.pack(">I", len(content))
        + chunk
        + content
        + struct.pack(">I", zlib.crc32(chunk + content))
        + data[place:]
    )


@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize("size", [1000, 2**20 - 9, 2**20 + 9, 2**23 + 9])
@pytest.mark.parametrize("chunk", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_png_texts_and_profiles_of_any_size(chunk, size, after_pixels):
    text = b"a" * size
    contents = {
        b"tEXt": b"key\0" + text,
        b"zTXt": b"key\0\0" + zlib.compress(text, 1),
        b"iTXt": b"key\0\1\0\0\0" + zlib.compress(text, 1),
        b"iCCP": b"profile\0\0" + zlib.compress(text, 1),
    }
    assert_same(open_image(png_with(chunk, contents[chunk], after_pixels)), noise())


def test_many_png_texts(tmp_path):
    data = encoded(noise())
    chunk = b"zTXtkey\0\0" + zlib.compress(b"a" * 2**20, 1)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = tmp_path / "texts.png"
    path.write_bytes(data[:33] + chunk * 80 + data[33:])
    assert_same(open_image(path), noise())


def test_an_orientation_among_long_texts_still_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), exif=exif)
    text = b"zTXtkey\0\0" + zlib.compress(b"a" * 2**22)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    assert open_image(data[:33] + chunk + data[33:], apply_exif=True).size == (30, 40)


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
