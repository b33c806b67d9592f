"""`Chat`: what a conversation keeps, forgets and reuses, and texts that stop an answer."""

import numpy as np
import pytest

from internvl3_jax import Chat
from internvl3_jax.config import UNITS
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.inference.text_stream import TextStreamer
from tests.support import tiny_checkpoint
from tests.support.chat_setup import SCRIPT, SMALL, WIDE, free_answer, shared, turns
from tests.support.tiny_checkpoint import make_image

# --- a conversation ------------------------------------------------------------------------------


def test_a_kept_cache_changes_no_answer(chat):
    """Three turns with a second image under another delta: the same ids with the cache of earlier
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


def test_delta_changes_the_answer_and_stays_with_its_image(chat):
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
    """After `undo` the same question finds its cache; another image at the same place does not, nor
    does anything after `reset`.
    """
    for image in (SMALL, make_image(16, 16, 9)):
        chat.reset()
        fresh = chat("Read the number.", images=[image]), chat.last.token_ids
        assert chat.last.reused_tokens == 0
        chat.reset()
        chat("Read the number.", images=[SMALL])
        prompt_tokens = chat.last.prompt_tokens
        chat.undo()
        answer = chat("Read the number.", images=[image]), chat.last.token_ids
        assert answer == fresh
        before_image = chat.tokenizer.encode("<|im_start|>user\n<img>")
        expected = prompt_tokens - 1 if image is SMALL else len(before_image)
        assert chat.last.reused_tokens == expected


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


# --- errors --------------------------------------------------------------------------------------


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
