"""prepare.py: what the settings of the data decide about the images of a row."""

import numpy as np
import pytest
from PIL import Image

from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.sources.catalog import open_sources
from tests.support.official_data import (
    PROCESSOR,
    data_config,
    encoded,
    make_image,
    tokenizer,
    turns,
    write_meta,
)

pytestmark = pytest.mark.smoke


def sample(folder, row, **settings):
    """The sample of a row, with PROCESSOR, whose own tile rule is the one of inference here."""
    config = data_config(write_meta(folder, a={"rows": [row]}), **settings)
    processor = type(PROCESSOR)(image_size=16, tokens_per_tile=4, max_tiles=4, system_message=None)
    return ExampleBuilder(config, processor, tokenizer()).sample(
        open_sources(config)[0], 0, np.random.default_rng(0)
    )


@pytest.mark.parametrize(
    ("settings", "tiles"),
    [({}, 4), ({"tiles": "shared"}, 4), ({"tiles": "per image", "tiles_per_row": 32}, 20)],
)
def test_the_rule_of_tiles_in_training_is_the_datas(tmp_path, settings, tiles):
    for number in range(4):
        make_image(32, 32, number).save(tmp_path / f"{number}.png")
    row = {
        "image": [f"{n}.png" for n in range(4)],
        "conversations": turns("<image><image><image><image>", "a"),
    }
    assert len(sample(tmp_path, row, **settings)["tiles"]) == tiles


def test_an_unknown_rule_of_tiles_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.tiles is 'each'"):
        sample(tmp_path, {"conversations": turns("a", "b")}, tiles="each")


def test_limits_of_images_come_from_the_settings(tmp_path):
    make_image(40, 30).save(tmp_path / "large.png")
    row = {"image": "large.png", "conversations": turns("<image>", "a")}
    with pytest.raises(
        ValueError,
        match=r"large\.png: 40 x 30 pixels are more than 1,199; .*data\.max_image_pixels",
    ):
        sample(tmp_path, row, max_image_pixels=1199)
    for limit in (1200, 0):
        assert len(sample(tmp_path, row, max_image_pixels=limit)["tiles"])
    data = encoded(make_image(90, 60), "JPEG")
    (tmp_path / "part.jpg").write_bytes(data[: len(data) // 2])
    row = {"image": "part.jpg", "conversations": turns("<image>", "a")}
    with pytest.raises(ValueError, match=r"part\.jpg: .*data\.allow_truncated"):
        sample(tmp_path, row)
    assert len(sample(tmp_path, row, allow_truncated=True)["tiles"])


def test_rows_that_the_reference_trains_on(tmp_path):
    """Text with <image>, more tags than images, an animation."""
    text = sample(
        tmp_path, {"conversations": turns("What does <image> do in SVG?", "It embeds an image.")}
    )
    assert len(text["tiles"]) == 0 and "<image>" in tokenizer().decode(text["tokens"])
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    row = {
        "image": "moving.gif",
        "conversations": turns("<image> and <image>", "a", "<image>", "b"),
    }
    moving = sample(tmp_path, row)
    assert moving["tiles"].shape == (1, 16, 16, 3) and (moving["tiles"] == (255, 0, 0)).all()
    assert tokenizer().decode(moving["tokens"]).count("<image>") == 2
