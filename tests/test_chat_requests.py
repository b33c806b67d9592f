"""`Chat`: batches of questions, and errors that leave the conversation as it was."""

import dataclasses
import inspect

import pytest

from internvl3_jax import Chat, Critic, CriticOptions, load
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.inference.generator import ContextError
from internvl3_jax.inference.options import OptionChanges, Options
from tests.support import tiny_checkpoint
from tests.support.chat_setup import SCRIPT, SMALL, WIDE, free_answer, turns

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
    before = list(chat.messages), chat.last
    together = chat.answer_many(REQUESTS, **options)
    assert (chat.messages, chat.last) == before
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
    "fewer tags than images": (
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
        "images is .*; give one or a list: paths, bytes, arrays or PIL images",
    ),
    "images is a number": (("hi", 5), {}, ChatError, "images is 5; give one or a list"),
    "no such image": (
        ("hi", ["nowhere/cat.png"]),
        {},
        ImageError,
        "nowhere/cat.png: no such file",
    ),
    "deltas": (("hi", [SMALL]), {"delta": ["1", "1/2"]}, ChatError, "2 deltas for 1 images"),
    "delta": (("hi", [SMALL]), {"delta": "1/3"}, ValueError, "'1/3' is not a multiple of 1/256"),
    "no delta": (
        ("hi", [SMALL]),
        {"delta": []},
        ValueError,
        r"delta is \[\]; give one, or one for",
    ),
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
    "temperature is not a number": (
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

    Messages count the images and tags of the whole conversation: one of each came before.
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


@pytest.mark.parametrize("kind, options", [(Chat, Options), (Critic, CriticOptions)])
def test_the_options_are_keywords_that_an_editor_shows(kind, options):
    fields = {field.name: (field.type, field.default) for field in dataclasses.fields(options)}
    parameters = inspect.signature(kind.__init__).parameters
    keywords = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in parameters.items()
        # The cache and the parameters are the object's own: no answer can change them.
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("cache", "donate")
    }
    assert keywords == fields


def test_the_changes_of_an_answer_are_the_options():
    assert OptionChanges.__annotations__ == Options.__annotations__


def test_a_chat_has_a_short_repr(chat):
    chat.reset()
    chat("hi", images=[SMALL])
    assert repr(chat).startswith("Chat(<1 turns, 1 images>") and len(repr(chat)) < 120
    critic = Critic(load(tiny_checkpoint.directory()), chat.generator, aggregate="min")
    assert repr(critic) == "Critic(aggregate='min')"
