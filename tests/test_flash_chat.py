"""The router in Chat, infer.py and the server."""

import json

import numpy as np
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.inference.engine.engine import Engine
from tests.support import tiny_checkpoint
from tests.support.live_server import parts, serving, user
from tests.support.tiny_checkpoint import FLASH, PROCESSOR, make_image, random_params

SAVED = FLASH.tokens_per_tile - FLASH.tokens_per_compressed_tile


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("flash") / "flash"
    files = tiny_checkpoint.tokenizer_files()
    save_checkpoint(place, random_params(FLASH, seed=1), FLASH, PROCESSOR, files)
    return place


@pytest.fixture(scope="module")
def checkpoint(directory):
    return load(directory)


@pytest.fixture(scope="module")
def chat(checkpoint):
    return Chat(checkpoint, max_new_tokens=8)


def images(count=2):
    return [make_image(64, 32, seed) for seed in range(count)]


def test_tiles_are_counted_and_off_means_all_tokens(chat):
    asked = [("What?", images()), ("What else?", [make_image(16, 16, 9)]), ("Hi", [])]
    on, off = chat.answer_many(asked), chat.answer_many(asked, flash="off")
    for a, b in zip(on, off, strict=True):
        assert a.tiles == b.tiles and b.compressed_tiles == []
        assert len(a.compressed_tiles) == len(a.tiles)
        assert b.prompt_tokens - a.prompt_tokens == SAVED * sum(a.compressed_tiles)
    first, single, text = on
    assert 0 < sum(first.compressed_tiles) < sum(first.tiles)
    assert (single.compressed_tiles, text.compressed_tiles) == ([0], [])
    assert [answer.token_ids for answer in chat.answer_many(asked, flash="auto")] == [
        answer.token_ids for answer in on
    ]
    for question, answer in zip(asked, on, strict=True):
        assert chat.answer_many([question])[0].token_ids == answer.token_ids


def test_later_turns_decide_about_all_tiles_of_the_conversation(checkpoint):
    chat, found = Chat(checkpoint, max_new_tokens=6), []
    for question, image in (("What?", images(1)), ("And this?", [make_image(32, 64, 7)])):
        chat(question, image)
        found.append(chat.last)
    fresh = Chat(checkpoint, max_new_tokens=6)
    fresh.messages, fresh.tiles = chat.messages[:-2], chat.tiles[:1]
    fresh.deltas, fresh.shown = chat.deltas[:1], chat.shown[:1]
    fresh("And this?", [make_image(32, 64, 7)])
    assert fresh.last.token_ids == found[1].token_ids
    assert fresh.last.compressed_tiles == found[1].compressed_tiles
    assert found[1].reused_tokens > 0 and fresh.last.reused_tokens == 0


def test_what_does_not_go_together_is_one_line(checkpoint, chat):
    with pytest.raises(ValueError, match="prompt_lookup does not support the router of a Flash"):
        chat.answer_many([("What?", images(1))], prompt_lookup=True)
    found = chat.answer_many([("What?", images(1))], prompt_lookup=True, flash="off")
    assert found[0].token_ids == chat.answer_many([("What?", images(1))], flash="off")[0].token_ids
    with pytest.raises(ValueError, match="flash is 'on'; it must be 'off' or 'auto'"):
        Chat(checkpoint, flash="on")
    with pytest.raises(ValueError, match="flash is 'auto', but the checkpoint has no router"):
        Chat(load(tiny_checkpoint.directory()), flash="auto")


def test_the_program(ask, directory, tmp_path):
    paths = []
    for number, image in enumerate(images()):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    flags = {"checkpoint": str(directory), "image": paths, "prompt": "What?", "json": True}
    on = json.loads(ask(**flags).out)
    assert on == json.loads(ask(**flags, flash="auto").out) | {"seconds": on["seconds"]}
    off = json.loads(ask(**flags, flash="off").out)
    assert 0 < sum(on["compressed_tiles"]) < sum(on["tiles"]) and "compressed_tiles" not in off
    assert off["prompt_tokens"] - on["prompt_tokens"] == SAVED * sum(on["compressed_tiles"])
    line = ask(**flags | {"json": False}, stats=True).err
    assert f"tiles {on['tiles']} ({on['compressed_tiles']} compressed), " in line


def test_the_server(checkpoint, chat):
    engine = Engine.of(checkpoint, rows=2, max_length=256)
    body = {"messages": user(parts("What?", *images()))}
    body |= {"max_tokens": 8, "temperature": 0}
    with serving(engine, checkpoint=checkpoint) as live:
        on = live.post(body).json
        off = live.post(body | {"flash": "off"}).json
        wrong = live.post(body | {"flash": "on"}).error
    expected = chat.answer_many([("What?", images())] * 2)
    assert on["choices"][0]["message"]["content"] == expected[0].text
    saved = off["usage"]["prompt_tokens"] - on["usage"]["prompt_tokens"]
    assert saved == SAVED * sum(expected[0].compressed_tiles)
    assert wrong["param"] == "flash"
    assert engine.stats.compressed_tiles == sum(expected[0].compressed_tiles)


def test_probabilities_differ_between_tiles(checkpoint):
    """Otherwise the tests of this file would show nothing."""
    engine = Engine.of(checkpoint, rows=1)
    tiles = np.stack([np.asarray(make_image(16, 16, seed)) for seed in range(4)])
    found = np.asarray(engine._device.encode(tiles, None).probability)
    assert found.max() - found.min() > 0.05
