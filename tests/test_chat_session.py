"""`Chat`: what is streamed, what a conversation keeps, how answers end, and batches of questions."""

import contextlib
import dataclasses
import functools
import inspect
import io

import jax
import numpy as np
import pytest

from internvl3_jax import Chat, Critic, load
from internvl3_jax.config import UNITS
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.inference.generator import ContextError, NotFiniteError
from internvl3_jax.inference.options import OptionChanges, Options
from internvl3_jax.inference.text_stream import TextStreamer
from tests.support import tiny_checkpoint
from tests.support.tiny_checkpoint import PROCESSOR, picture

LIMIT = 12  # short answers keep prompt and answer in the smallest buckets
WIDE, SMALL = picture(40, 16, 1), picture(16, 16, 2)  # 3 tiles and a thumbnail; 1 tile


@functools.cache
def shared() -> Chat:
    return Chat(load(tiny_checkpoint.directory()), max_new_tokens=LIMIT)


@pytest.fixture
def chat():
    """One `Chat` serves all tests; what they do to it is undone."""
    chat = shared()
    options = chat.options
    chat.reset()
    yield chat
    chat.options = options


def turns(chat, script, reuse):
    """Answers to (question, images, options) one after another."""
    chat.reset()
    answers = []
    for question, images, options in script:
        if not reuse:
            chat._cached = None
        chat(question, images=images, **options)
        answers.append(chat.last)
    return answers


# --- one answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images", [[], [WIDE], [SMALL, WIDE]], ids=["text", "one picture", "two pictures"]
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
    """A picture is a path, bytes, an array or a PIL image; <image> is put in front where the
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
            generator.params = kept | {"language": broken}
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
        generator.params = kept
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


# --- a conversation ------------------------------------------------------------------------------

SCRIPT = [
    ("Read the number.", [WIDE], {}),
    ("And the digits?", [], {}),
    ("Which number is larger?", [SMALL], {"delta": "1/4"}),
]


def test_a_kept_cache_changes_no_answer(chat):
    """Three turns with a second picture under another delta: the same ids with the cache of earlier
    turns and without.
    """
    kept, fresh = turns(chat, SCRIPT, reuse=True), turns(chat, SCRIPT, reuse=False)
    assert [answer.token_ids for answer in kept] == [answer.token_ids for answer in fresh]
    assert [answer.prompt_tokens for answer in kept] == [answer.prompt_tokens for answer in fresh]
    assert all(answer.reused_tokens == 0 for answer in fresh)
    assert kept[0].reused_tokens == 0
    for before, after in zip(kept, kept[1:], strict=False):
        assert before.prompt_tokens <= after.reused_tokens < after.prompt_tokens
    assert [answer.tiles for answer in kept] == [[4], [4], [4, 1]]


def test_a_conversation_is_one_prompt(chat):
    """The history of a conversation, asked anew as one, gives the same answer."""
    turns(chat, SCRIPT[:3], reuse=True)
    expected, messages = chat.last, chat.messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[4]["content"] == "<image>\nWhich number is larger?"
    other = Chat.__new__(Chat)
    other.__dict__.update(shared().__dict__)
    other.reset()
    other.messages, other.tiles, other.deltas = messages[:4], chat.tiles[:1], [UNITS]
    other(SCRIPT[2][0], images=[SMALL], delta="1/4")
    assert (other.last.token_ids, other.last.prompt_tokens) == (
        expected.token_ids,
        expected.prompt_tokens,
    )


def test_delta_changes_the_answer_and_stays_with_its_picture(chat):
    plain = turns(chat, SCRIPT[:2], reuse=True)
    assert chat.deltas == [UNITS]
    script = [
        (question, images, {"delta": "1/16"} if images else {})
        for question, images, _ in SCRIPT[:2]
    ]
    slow = turns(chat, script, reuse=True)
    assert chat.deltas == [UNITS // 16]
    assert [answer.prompt_tokens for answer in slow][0] == plain[0].prompt_tokens
    assert slow[0].token_ids != plain[0].token_ids
    assert slow[1].reused_tokens >= slow[0].prompt_tokens
    assert [answer.token_ids for answer in turns(chat, script, reuse=False)] == [
        answer.token_ids for answer in slow
    ]
    chat.reset()
    chat("<image> <image>", images=[SMALL, WIDE], delta=["1", 0.25])
    assert chat.deltas == [UNITS, UNITS // 4]


def test_only_the_same_beginning_is_reused(chat):
    """After `reset` the same question may find its cache no more; after another picture at the same
    place neither.
    """
    chat("Read the number.", images=[SMALL])
    cached, prompt_tokens = chat._cached, chat.last.prompt_tokens
    for image, expected in [(SMALL, prompt_tokens - 1), (picture(16, 16, 9), 0)]:
        chat.reset()
        fresh = chat("Read the number.", images=[image]), chat.last.token_ids
        chat.reset()
        chat._cached = cached
        answer = chat("Read the number.", images=[image]), chat.last.token_ids
        assert answer == fresh
        before_picture = chat.tokenizer.encode("<|im_start|>user\n<img>")
        assert chat.last.reused_tokens == (expected or len(before_picture))
        cached = chat._cached
    chat.reset()
    chat("Read the number.", images=[SMALL])
    assert chat.last.reused_tokens == 0


def test_reset_forgets(chat):
    first = turns(chat, SCRIPT[:1], reuse=True)[0]
    chat("And the digits?")
    chat.reset()
    assert (chat.messages, chat.tiles, chat.deltas, chat.last) == ([], [], [], None)
    chat(*SCRIPT[0][:1], images=SCRIPT[0][1])
    assert (chat.last.token_ids, chat.last.tiles) == (first.token_ids, [4])


def test_a_turn_that_is_left_does_not_enter_the_conversation(chat):
    expected = [answer.token_ids for answer in turns(chat, SCRIPT[:2], reuse=True)]
    chat.reset()
    chat(SCRIPT[0][0], images=SCRIPT[0][1])
    before = list(chat.messages), chat.last
    for steps in (0, 1):
        stream = chat.stream("What is this?", images=[SMALL])
        for _ in range(steps):
            next(stream)
        stream.close()
        assert (chat.messages, chat.last, len(chat.tiles)) == (*before, 1)
    chat(SCRIPT[1][0])
    assert [before[1].token_ids, chat.last.token_ids] == expected


# --- stop texts ----------------------------------------------------------------------------------


@functools.cache
def free_answer():
    """(text, ids) of an answer without stop texts, with letters of several tokens in it."""
    chat = shared()
    chat.reset()
    chat("Read the number.", images=[WIDE])
    return chat.last.text, chat.last.token_ids


@pytest.mark.parametrize("length", [1, 3, 5])
def test_stop_texts_end_the_answer(chat, length):
    """Every piece of an answer as its stop text: the answer ends before its first place, and no
    part of it is streamed.
    """
    text, ids = free_answer()
    decoder = chat.tokenizer.stream()
    lengths = np.cumsum([len(decoder.step(token) or "") for token in ids])
    crossed = 0
    for start in range(0, len(text) - length, 3):
        stop = text[start : start + length]
        chat.reset()
        pieces = list(chat.stream("Read the number.", [WIDE], stop=["never said", stop]))
        place = text.find(stop)
        assert chat.last.text == text[:place].strip()
        assert "".join(pieces) == text[:place]
        assert chat.last.token_ids == ids[: len(chat.last.token_ids)]
        needed = int(np.searchsorted(lengths, place + length)) + 1
        assert len(chat.last.token_ids) == needed
        crossed += np.searchsorted(lengths, place, side="right") + 1 < needed
    assert length == 1 or crossed  # some of them went over several tokens


def test_a_stopped_answer_is_gone_on_from(chat):
    text, _ = free_answer()
    script = [("Read the number.", [WIDE], {"stop": [text[4:6]]}), ("And now?", [], {})]
    kept, fresh = turns(chat, script, reuse=True), turns(chat, script, reuse=False)
    assert [answer.token_ids for answer in kept] == [answer.token_ids for answer in fresh]
    assert kept[1].reused_tokens >= kept[0].prompt_tokens
    assert chat.messages[1]["content"] == text[: text.find(text[4:6])].strip()


class Spelled:
    """A tokenizer whose ids are characters; negative ones come with the flush, as the bytes of an
    unfinished character do.
    """

    def stream(self):
        self.pending = ""
        return self

    def step(self, token):
        if token < 0:
            self.pending += chr(-token)
            return None
        return chr(token)

    def flush(self):
        return self.pending


def read(text, stop, flushed=""):
    """(pieces, what came at the end, ended, ids) of characters read one by one."""
    reader = TextStreamer(Spelled(), stop)
    pieces = [
        reader.read([token]) for token in [*map(ord, text), *(-ord(letter) for letter in flushed)]
    ]
    last = reader.finish()
    assert reader.text == "".join(pieces) + last
    return pieces[: len(text)], last, reader.ended, len(reader.ids)


def test_what_may_begin_a_stop_text_is_held_back():
    assert read("abx", ["abc"]) == (["", "", "abx"], "", False, 3)
    assert read("aab", ["ab"]) == (["", "a", ""], "", True, 3)
    assert read("xaaab", ["aab"]) == (["x", "", "", "a", ""], "", True, 5)
    assert read("ababac", ["abac"]) == (["", "", "", "ab", "", ""], "", True, 6)
    assert read("xab", ["abc"]) == (["x", "", ""], "ab", False, 3)
    assert read("xyz", ["z", "y"]) == (["x", "", ""], "", True, 2)
    assert read("xyz", [""]) == (["x", "y", "z"], "", False, 3)


def test_a_stop_text_in_the_last_unfinished_piece():
    assert read("x", ["END"], flushed="yEND\ufffd") == (["x"], "y", True, 6)
    assert read("xE", ["END"], flushed="ND") == (["x", ""], "", True, 4)
    assert read("xE", ["END"], flushed="N\ufffd") == (["x", ""], "EN\ufffd", False, 4)


def test_text_of_several_bytes_arrives_whole():
    tokenizer = Tokenizer.from_files(tiny_checkpoint.tokenizer_files())
    text = "Größe 数字 \U0001f600!"
    reader = TextStreamer(tokenizer, ["\U0001f600"])
    pieces = [reader.read([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == "Größe 数字 " and not any("\ufffd" in piece for piece in pieces)
    assert reader.ended and reader.finish() == ""


# --- batches -------------------------------------------------------------------------------------

REQUESTS = [
    ("Read the number.", [WIDE]),
    ("How many digits are there?", []),
    ("Image-1: <image>\nImage-2: <image>\nWhich number is larger?", [SMALL, WIDE]),
    ("hi", [SMALL]),
]


@pytest.mark.parametrize(
    "options", [{}, {"delta": "1/16"}, {"temperature": 2.0, "seed": 5}], ids=str
)
def test_many_are_answered_as_one_by_one(chat, options):
    text, _ = free_answer()
    options = options | {"stop": [text[5:7]]}
    chat("Before.")
    before = list(chat.messages), chat._cached
    together = chat.answer_many(REQUESTS, **options)
    assert (chat.messages, chat._cached) == before
    for (question, images), answer in zip(REQUESTS, together, strict=True):
        chat.reset()
        assert chat(question, images=images, **options) == answer.text
        alone = chat.last
        assert (alone.token_ids, alone.prompt_tokens, alone.tiles) == (
            answer.token_ids,
            answer.prompt_tokens,
            answer.tiles,
        )


def test_errors_of_a_batch_name_the_request(chat):
    pairs = [("hi", []), ("<image>", [SMALL, SMALL])]
    with pytest.raises(ChatError, match="^request 2: 2 images, but 1 <image> tags"):
        chat.answer_many(pairs)
    with pytest.raises(ChatError, match="^line 8: 2 images, but 1 <image> tags"):
        chat.candidates(pairs, 1, names=["line 7", "line 8"])
    with pytest.raises(ImageError, match="^line 8: nowhere.png: no such file"):
        chat.candidates([("hi", []), ("hi", "nowhere.png")], 1, names=["line 7", "line 8"])
    with pytest.raises(ContextError, match="^request 2: the prompt of"):
        chat.answer_many([("hi", []), ("number " * 2100, [])])


# --- errors --------------------------------------------------------------------------------------

WRONG = {
    "fewer tags than pictures": (
        ("<image>", [SMALL, WIDE]),
        {},
        ChatError,
        "3 images, but 2 <image> tags",
    ),
    "images is a path": (
        ("hi", "nowhere/cat.png"),
        {},
        ImageError,
        "nowhere/cat.png: no such file",
    ),
    "images is an object": (
        ("hi", {"a.png": 1}),
        {},
        ChatError,
        "give one image or a list of them",
    ),
    "images is a number": (("hi", 5), {}, ChatError, "images is 5; give one image"),
    "no such picture": (
        ("hi", ["nowhere/cat.png"]),
        {},
        ImageError,
        "nowhere/cat.png: no such file",
    ),
    "deltas": (("hi", [SMALL]), {"delta": ["1", "1/2"]}, ChatError, "2 deltas for 1 images"),
    "delta": (("hi", [SMALL]), {"delta": "1/3"}, ValueError, "'1/3' is not a multiple of 1/256"),
    "context": (("number " * 2100, []), {}, ContextError, "the model knows 2,048"),
    "temperature": (
        ("hi", []),
        {"temperature": -1.0},
        ValueError,
        "temperature is -1.0; it must be 0",
    ),
    "temperature is a text": (
        ("hi", []),
        {"temperature": "hot"},
        ValueError,
        "temperature is 'hot'; it must be a number",
    ),
    "temperature without end": (
        ("hi", []),
        {"temperature": float("inf")},
        ValueError,
        "temperature is inf; it must be 0",
    ),
    "temperature is no number": (
        ("hi", []),
        {"temperature": float("nan")},
        ValueError,
        "temperature is nan; it must be 0",
    ),
    "stop": (
        ("hi", []),
        {"stop": [5]},
        ValueError,
        r"stop is \[5\]; it must be a text or a list of texts",
    ),
    "system": (("hi", []), {"system": 5}, ValueError, "system is 5; it must be a text or None"),
    "limit is no whole number": (
        ("hi", []),
        {"max_new_tokens": 2.5},
        ValueError,
        "max_new_tokens is 2.5; it must be a whole number",
    ),
    "top_p": (("hi", []), {"top_p": 0.0}, ValueError, "top_p is 0.0"),
    "limit": (
        ("hi", []),
        {"max_new_tokens": 0},
        ValueError,
        "max_new_tokens is 0; it must be at least 1",
    ),
    "tiles": (
        ("hi", [SMALL]),
        {"max_tiles": 0},
        ValueError,
        "max_tiles is 0; it must be at least 1",
    ),
    "seed": (("hi", []), {"seed": -1}, ValueError, "seed is -1"),
    "large seed": (("hi", []), {"seed": 2**32}, ValueError, "seed is 4294967296"),
}


def test_a_failed_turn_does_not_enter_the_conversation(chat):
    """Every kind of mistake is named, leaves the conversation as it was, and costs it nothing of
    its cache.

    Messages count the pictures and tags of the whole conversation: one of each came before.
    """
    expected = turns(chat, SCRIPT[:2], reuse=True)
    chat.reset()
    chat(SCRIPT[0][0], images=SCRIPT[0][1])
    before = list(chat.messages), len(chat.tiles), list(chat.deltas), chat.last
    for name, (arguments, options, kind, message) in WRONG.items():
        with pytest.raises(kind, match=message):
            chat(*arguments, **options)
        assert (chat.messages, len(chat.tiles), chat.deltas, chat.last) == before, name
    chat(SCRIPT[1][0])
    assert (chat.last.token_ids, chat.last.reused_tokens) == (
        expected[1].token_ids,
        expected[1].reused_tokens,
    )


def test_an_unknown_option_is_an_error(chat):
    with pytest.raises(
        TypeError, match="Chat has no option 'temprature'; did you mean 'temperature'?"
    ):
        chat("hi", temprature=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        Chat(load(tiny_checkpoint.directory()), temprature=1.0)


def test_wrong_arguments_fail_when_they_are_given():
    checkpoint = load(tiny_checkpoint.directory())
    with pytest.raises(ValueError, match="temperature is -1.0; it must be 0"):
        Chat(checkpoint, temperature=-1)
    with pytest.raises(ValueError, match="'1/3' is not a multiple"):
        Chat(checkpoint, delta="1/3")
    with pytest.raises(TypeError, match="not 'somewhere'; write Chat"):
        Chat("somewhere")
    with pytest.raises(ValueError, match=r"adapter is \['a'\]; give its name"):
        Chat(checkpoint, ["a"])
    for stop in ("", [".", ""]):
        with pytest.raises(ValueError, match="an empty text would end every answer at once"):
            Chat(checkpoint, stop=stop)
    for tokens in ((), ("",)):
        with pytest.raises(ValueError, match="stop_tokens is .*name the tokens that end an answer"):
            dataclasses.replace(checkpoint.processor, stop_tokens=tokens)


def test_the_options_are_keywords_that_an_editor_shows():
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    parameters = inspect.signature(Chat.__init__).parameters
    keywords = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords == fields
    assert OptionChanges.__annotations__ == Options.__annotations__


def test_a_chat_has_a_short_repr(chat):
    chat.reset()
    chat("hi", images=[SMALL])
    assert repr(chat).startswith("Chat(<1 turns, 1 images>") and len(repr(chat)) < 120
    critic = Critic(load(tiny_checkpoint.directory()), chat.generator, aggregate="min")
    assert repr(critic) == "Critic(aggregate='min')"


def test_undo_takes_back_a_turn(chat):
    """The next answer is the one that it would have been, and reuses the cache."""
    expected = turns(chat, SCRIPT[:2], reuse=True)
    chat.reset()
    with pytest.raises(ValueError, match="the conversation is empty"):
        chat.undo()
    chat(SCRIPT[0][0], images=SCRIPT[0][1])
    chat("What else?", images=[WIDE])
    chat.undo()
    assert len(chat.messages) == 2 and len(chat.tiles) == len(SCRIPT[0][1])
    chat(SCRIPT[1][0], images=SCRIPT[1][1], **SCRIPT[1][2])
    assert chat.last.token_ids == expected[1].token_ids and chat.last.reused_tokens > 0
    chat.undo()
    chat.undo()
    assert (chat.messages, chat.tiles, chat.deltas) == ([], [], [])


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
    assert lines == ["vision tower", "prefill", "decode"]
    parts = first.compile_seconds + first.first_token_seconds
    assert 0 < first.compile_seconds < first.seconds and parts <= first.seconds
    chat.reset()
    chat("hi", images=[SMALL])
    assert chat.last.compile_seconds == 0.0 and len(lines) == 3
    assert chat.last.token_ids == first.token_ids
