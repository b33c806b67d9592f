"""`Chat`: what is streamed, what one answer holds, and why it ended."""

import contextlib
import io

import jax
import numpy as np
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.inference.asked import Engines
from internvl3_jax.inference.sampling import NotFiniteError
from internvl3_jax.inference.text_stream import TextStreamer
from tests.support import tiny_checkpoint
from tests.support.chat_setup import LIMIT, SMALL, WIDE
from tests.support.tiny_checkpoint import PROCESSOR

# --- one answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images", [[], [WIDE], [SMALL, WIDE]], ids=["text", "one image", "two images"]
)
def test_pieces_join_to_the_text(chat, images):
    pieces = list(chat.stream("Read the number.", images))
    last = chat.last
    assert "".join(pieces).strip() == last.text
    assert last.text == chat.tokenizer.decode(last.token_ids).strip()
    assert len(last.token_ids) <= LIMIT and last.reused_tokens == 0
    # each has the limit of four tiles for itself
    assert last.tiles == {0: [], 1: [4], 2: [1, 4]}[len(images)]
    assert 0 < last.first_token_seconds <= last.seconds
    assert last.seconds_per_token == pytest.approx(
        (last.seconds - last.compile_seconds - last.first_token_seconds) / (len(last.token_ids) - 1)
    )


def test_a_call_is_the_joined_stream(chat, tmp_path):
    """An image is a path, bytes, an array or a PIL image; <image> is put in front where the
    question has none.
    """
    WIDE.save(tmp_path / "wide.png")
    text = chat("Read the number.", images=[WIDE])
    ids, prompt_tokens = chat.last.token_ids, chat.last.prompt_tokens
    path = tmp_path / "wide.png"
    for image in (path, str(path), path.read_bytes(), np.asarray(WIDE)):
        chat.reset()
        assert chat("<image>\nRead the number.", images=[image]) == text
        assert (chat.last.token_ids, chat.last.prompt_tokens) == (ids, prompt_tokens)


def test_the_rule_and_the_limits_of_tiles(chat):
    """Shared, the limit of four is two for each, which for the wide one are two and a thumbnail."""

    def tiles(**options):
        return [len(part) for part in chat.prepare("hi", [SMALL, WIDE], **options).tiles]

    assert tiles() == tiles(tiles="per image") == [1, 4]
    assert tiles(tiles="shared") == tiles(max_total_tiles=4) == [1, 3]
    assert tiles(max_tiles=1) == tiles(max_total_tiles=1) == [1, 1]
    for options, message in [
        ({"tiles": "mine"}, "tiles is 'mine'; it must be one of 'per image', 'shared'"),
        ({"max_image_pixels": 100}, "pixels"),
        ({"max_total_tiles": -1}, "max_total_tiles is -1; it must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            chat.prepare(
                "hi",
                [SMALL, WIDE] if "max_image_pixels" not in options else encoded(WIDE),
                **options,
            )


def encoded(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_one_image_need_not_be_in_a_list(chat, tmp_path):
    """A path is one image and not its letters; an array is one image and not its rows."""
    WIDE.save(tmp_path / "wide.png")
    chat("Read the number.", images=[WIDE])
    expected = chat.last.token_ids, chat.last.tiles
    path = tmp_path / "wide.png"
    for image in (
        path,
        str(path),
        path.read_bytes(),
        np.asarray(WIDE),
        WIDE,
        (WIDE,),
        np.asarray(WIDE)[None],
    ):
        chat.reset()
        chat("Read the number.", images=image)
        assert (chat.last.token_ids, chat.last.tiles) == expected
    (together,) = chat.answer_many([("Read the number.", path)])
    assert (together.token_ids, together.tiles) == expected
    chat.reset()
    chat("Read the number.", images=None)
    assert chat.last.tiles == []


def test_the_prompt_is_as_long_as_its_parts(chat):
    chat("hi")
    text_only = chat.last.prompt_tokens
    chat.reset()
    chat("hi", images=[WIDE])
    added = len(chat.tokenizer.encode("<img></img>")) + 4 * PROCESSOR.tokens_per_tile
    assert chat.last.prompt_tokens == text_only + added + len(chat.tokenizer.encode("\nhi")) - len(
        chat.tokenizer.encode("hi")
    )


def test_the_system_message_is_part_of_the_question(chat):
    chat("hi", images=[SMALL])
    plain = chat.last
    chat.reset()
    chat("hi", images=[SMALL], system="Read the number.")
    assert chat.last.prompt_tokens > plain.prompt_tokens and chat.last.token_ids != plain.token_ids
    assert chat.messages[0] == {"role": "system", "content": "Read the number."}


def test_seeds_and_temperature(chat):
    def ask(**options):
        chat.reset()
        chat("Read the number.", images=[SMALL], **options)
        return chat.last.token_ids

    assert (
        ask(temperature=2.0, seed=3) == ask(temperature=2.0, seed=3) != ask(temperature=2.0, seed=4)
    )
    assert ask(temperature=2.0, seed=3) != ask()


def test_a_tiny_temperature_is_greedy(chat):
    greedy = [answer.token_ids for answer in chat.answer_many([("Read the number.", [SMALL])])]
    for temperature in (1e-7, 1e-30, 1e-38, 5e-324):
        drawn = chat.answer_many([("Read the number.", [SMALL])], temperature=temperature)
        assert [answer.token_ids for answer in drawn] == greedy


def test_why_an_answer_ended(chat):
    chat("hi", images=[SMALL])
    assert chat.last.finish == "length" and len(chat.last.token_ids) == LIMIT
    (answer,) = chat.answer_many([("hi", [SMALL])], stop=chat.last.text[3])
    assert (
        answer.finish == "stop"
        and answer.text == chat.last.text.split(chat.last.text[3])[0].strip()
    )
    generator, free = chat.generator, chat.last.token_ids
    kept, generator.stop_ids = generator.stop_ids, (free[LIMIT - 1],)
    try:
        # the last token that there is room for is a stop token
        (answer,) = chat.answer_many([("hi", [SMALL])])
        assert answer.finish == "stop"
    finally:
        generator.stop_ids = kept


def test_a_stop_text_is_one_text_and_not_its_letters(chat):
    chat("Read the number.", images=[WIDE])
    text = chat.last.text
    chat.reset()
    assert (
        chat("Read the number.", images=[WIDE], stop=text[4:6])
        == text[: text.index(text[4:6])].strip()
    )
    assert TextStreamer(chat.tokenizer, "x6")._stop == ["x6"]


def test_logits_that_are_not_finite_are_an_error_and_no_noise(chat):
    """In the prompt, and later: from some position on."""
    generator = chat.generator
    kept = generator.params
    chat("hi")
    messages = list(chat.messages)
    try:
        for value in (np.nan, np.inf):
            broken = dict(kept["language"])
            broken["head"] = jax.tree.map(lambda leaf, value=value: leaf * value, broken["head"])
            generator.base = generator.params = kept | {"language": broken}
            chat.engines, chat._own = Engines(generator), Engines(generator)
            for options in (
                {},
                {"temperature": 1.0},
                {"temperature": 1.0, "top_k": 5, "top_p": 0.5},
            ):
                with pytest.raises(NotFiniteError, match="NaN or infinite logits for token 1"):
                    chat("And?", **options)
                with pytest.raises(NotFiniteError, match="token 1 of an answer"):
                    chat.answer_many([("a", []), ("b", [])], **options)
    finally:
        generator.base = generator.params = kept
        chat.engines, chat._own = Engines(generator), Engines(generator)
    assert chat.messages == messages


def test_a_stop_token_ends_an_answer_and_is_among_its_ids(chat):
    """The second id that the model would give is made its stop token."""
    chat("hi", images=[SMALL])
    free = chat.last.token_ids
    generator = chat.generator
    place = next(index for index, token in enumerate(free) if index and token not in free[:index])
    kept, generator.stop_ids = generator.stop_ids, (free[place],)
    try:
        chat.reset()
        chat("hi", images=[SMALL])
        assert chat.last.token_ids == free[: place + 1]
    finally:
        generator.stop_ids = kept


# --- errors --------------------------------------------------------------------------------------


def test_compilation_is_timed_apart():
    """Of an answer with shapes that nothing had before, and of the same question again."""
    chat = Chat(load(tiny_checkpoint.directory()), max_new_tokens=700)
    lines = []
    clock = chat.generator.compile_clock

    @contextlib.contextmanager
    def progress(program):
        lines.append(program)
        yield

    clock.progress = progress
    chat("hi", images=[SMALL])
    first = chat.last
    assert lines == ["vision tower", "prefill", "first token", "decode"]
    parts = first.compile_seconds + first.first_token_seconds
    assert 0 < first.compile_seconds < first.seconds and parts <= first.seconds
    chat.reset()
    chat("hi", images=[SMALL])
    assert chat.last.compile_seconds == 0.0 and len(lines) == 4
    assert chat.last.token_ids == first.token_ids
