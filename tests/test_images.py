"""Opening images of every kind."""

import io
import struct
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from internvl3_jax.data.media.images import ImageError, open_image
from tests.support.noise_images import encoded, noise


def assert_same(image, expected):
    assert image.mode == "RGB" and type(image) is Image.Image
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "JPEG", "WEBP", "TIFF", "GIF", "PPM"])
def test_every_way_of_passing_a_image(tmp_path, file_format):
    data = encoded(noise(), file_format)
    with Image.open(io.BytesIO(data)) as lazy:
        expected = lazy.convert("RGB")
    path = tmp_path / "image.any"
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
def test_palette_with_transparency_keeps_its_colors_and_does_not_warn(transparency):
    image = noise().quantize(64)
    data = encoded(image, transparency=transparency)
    with Image.open(io.BytesIO(data)) as lazy:
        assert "transparency" in lazy.info
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(data)
    assert_same(opened, image.convert("RGB"))


def test_transparent_palette_image_is_left_as_it_was():
    image = noise().quantize(64)
    image.info["transparency"] = bytes(64)
    assert_same(open_image(image), noise().quantize(64).convert("RGB"))
    assert image.info["transparency"] == bytes(64)


@pytest.mark.parametrize("source", ["PNG", "TIFF", "PPM", "array", "PIL"])
def test_16_bit_gray_keeps_the_high_byte(source):
    values = np.array([[0, 1, 255, 256, 511], [512, 4095, 32768, 65280, 65535]], np.uint16)
    image = Image.fromarray(values)
    given = {"array": values, "PIL": image}.get(source)
    given = encoded(image, source) if given is None else given
    expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert_same(open_image(given), expected)


def test_16_bit_big_endian_gray():
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


def test_arrays_of_other_libraries_and_buffers():
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    assert_same(open_image(jnp.asarray(array)), array)
    file = encoded(Image.fromarray(array), "PNG")
    assert_same(open_image(bytearray(file)), array)
    assert_same(open_image(memoryview(file)), array)

    class OnDevice:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    with pytest.raises(ImageError, match=r"OnDevice: cannot be read as .*cuda:0.*; pass a numpy"):
        open_image(OnDevice())
    with pytest.raises(ImageError, match="'': an empty text is not a path"):
        open_image("")


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
        ImageError, match=r"array .*\[.*\]: is not an image array; give uint8 \[height, width, 3\]"
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


def test_exif_orientation_of_16_bit_gray():
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


def test_frame_of_a_single_image():
    assert_same(open_image(encoded(noise()), frame=0), noise())
    with pytest.raises(ImageError, match="has no frame 1"):
        open_image(encoded(noise()), frame=1)


def test_photograph_with_a_preview_is_one_image():
    main, preview = noise(64, 48), noise(16, 12, seed=1)
    data = encoded(main, "MPO", save_all=True, append_images=[preview])
    with Image.open(io.BytesIO(data)) as lazy:
        assert lazy.format == "MPO" and lazy.n_frames == 2
        expected = lazy.convert("RGB")
    assert_same(open_image(data), expected)


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
