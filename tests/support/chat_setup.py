"""Asks one `Chat` of the tiny checkpoint, which the tests of a process share."""

import functools

from internvl3_jax import Chat, load
from tests.support import tiny_checkpoint
from tests.support.tiny_checkpoint import make_image

LIMIT = 12  # short answers keep prompt and answer in the smallest buckets
WIDE, SMALL = make_image(40, 16, 1), make_image(16, 16, 2)  # 3 tiles and a thumbnail; 1 tile


@functools.cache
def shared() -> Chat:
    return Chat(load(tiny_checkpoint.directory()), max_new_tokens=LIMIT)


def turns(chat, script, reuse):
    """Answers to (question, images, options) one after another."""
    chat.reset()
    answers = []
    for question, images, options in script:
        if not reuse:
            chat._forget()
        chat(question, images=images, **options)
        answers.append(chat.last)
    return answers


SCRIPT = [
    ("Read the number.", [WIDE], {}),
    ("And the digits?", [], {}),
    ("Which number is larger?", [SMALL], {"delta": "1/4"}),
]


@functools.cache
def free_answer():
    """(text, ids) of an answer without stop texts, with letters of several tokens in it."""
    chat = shared()
    chat.reset()
    chat("Read the number.", images=[WIDE])
    return chat.last.text, chat.last.token_ids
