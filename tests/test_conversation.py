"""A conversation in a terminal without a model: commands, images, Ctrl-C, and text that cannot
drive the terminal.
"""

import io
import re
import sys

import pytest

from internvl3_jax.inference.compile_clock import CompileClock
from internvl3_jax.inference.conversation import Conversation, image_paths
from internvl3_jax.inference.options import Options
from internvl3_jax.inference.terminal_answers import TerminalAnswers
from tests.support.official_data import write_video
from tests.support.pdfs import plain_pdf, write
from tests.support.tiny_checkpoint import PROCESSOR, make_image

PAGE = plain_pdf("/MediaBox [0 0 100 100]")


class Model:
    """What a conversation uses of a `Chat`."""

    def __init__(self):
        self.processor, self.options, self.resets, self.used = PROCESSOR, Options(), 0, []
        self.undone = 0

    def undo(self):
        self.undone += 1

    def reset(self):
        self.resets += 1

    def use(self, name):
        self.used.append(name)


def talk(monkeypatch, lines, ask, terminal=True):
    """A conversation of these lines; a BaseException among them is raised by `input`."""
    given = iter(lines)

    def read(prompt):
        line = next(given, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(
        sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: terminal})()
    )
    model = Model()
    conversation = Conversation(model, ask)
    conversation.run()
    return conversation


def test_ctrl_c_stops_the_answer_and_not_the_conversation(monkeypatch, capsys, tmp_path):
    make_image(8, 8).save(tmp_path / "a.png")
    asked = []

    def ask(chat, question, images):
        asked.append((question, list(images)))
        if len(asked) == 1:
            raise KeyboardInterrupt

    talk(
        monkeypatch,
        [f"/image {tmp_path}/a.png", "first", "again", KeyboardInterrupt(), "third", "/quit"],
        ask,
    )
    path = str(tmp_path / "a.png")
    assert asked == [("first", [path]), ("again", [path]), ("third", [])]
    assert capsys.readouterr().err.count("stopped; /quit or Ctrl-D leaves") == 2


def test_ctrl_c_twice_at_the_prompt_leaves(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, [KeyboardInterrupt(), KeyboardInterrupt()], None)
    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, [KeyboardInterrupt()], None, terminal=False)


def test_commands(monkeypatch, capsys):
    asked = []

    def ask(chat, question, images):
        asked.append(question)

    lines = [
        "/imge x",
        "/help",
        "/reset",
        "/undo",
        "/adapter a",
        "/adapter",
        "/image",
        "/images",
        "exit",
        " /etc is what?",
        r"a\nb",
        "what is <image>?",
        "",
        "/exit",
    ]
    conversation = talk(monkeypatch, [*lines, "not asked"], ask)
    assert asked == ["/etc is what?", "a\nb", "what is <image>?"]
    assert conversation.chat.resets == conversation.chat.undone == 1 and conversation.chat.used == [
        "a",
        None,
    ]
    err = capsys.readouterr().err
    assert "there is no command /imge; did you mean '/image'? Commands: /image, /video" in err
    assert err.count("note: no image for <image>: it is sent to the model as text\n") == 1
    assert "/image needs a path" in err and "no images" in err
    assert "write /quit to leave; a question of one word cannot be 'exit'" in err


def test_videos_and_pdfs_wait_for_the_next_question(monkeypatch, capsys, tmp_path):
    video, pdf = str(write_video(tmp_path / "a.mp4", 4)), write(tmp_path / "a.pdf", PAGE)
    asked = []
    lines = [f"/video {video}", f"/pdf {pdf}", "/images", "What?", "And?"]
    lines += ["/video", f"/pdf {video}", f"/video {pdf}", f"/pdf {pdf}", "/forget", "Now?"]
    talk(monkeypatch, lines, lambda chat, *inputs: asked.append(list(inputs)))
    assert asked == [["What?", [], [video], [pdf]], ["And?", []], ["Now?", []]]
    err = capsys.readouterr().err
    assert f"{video}\n{pdf}\n" in err and "/video needs a path, such as /video clip.mp4" in err
    assert "a.mp4: is not a PDF" in err and "a.pdf: cannot be decoded" in err


def test_an_image_is_looked_at_at_once(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    conversation = talk(
        monkeypatch, [f"/image {tmp_path}/a.png", f"/image {tmp_path}/none.png"], None
    )
    assert conversation.images == []
    assert capsys.readouterr().err.count("error: ") == 2


def test_paths_as_terminals_write_them(tmp_path, monkeypatch):
    path = tmp_path / "my cat's [1].png"
    path.touch()
    (tmp_path / "b.png").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in (
        str(path),
        "~/my cat's [1].png",
        str(path).replace(" ", "\\ ").replace("'", "\\'"),
        f'"{path}"',
    ):
        assert image_paths(text) == [str(path)]
    assert image_paths(f'"{path}" ~/b.png') == [str(path), str(tmp_path / "b.png")]
    assert image_paths("no such file.png") == ["no such file.png"]


def test_an_answer_cannot_drive_the_terminal(capsys):
    class Fake:
        class generator:
            compile_clock = CompileClock()

        class last:
            text, token_ids, prompt_tokens, tiles, seconds, finish = (
                "\x1b[2J",
                [1],
                1,
                [],
                1.0,
                "stop",
            )

        def stream(self, question, images):
            yield "\x1b]52;c;cHduZWQ=\x07\x9b2J\u202epw"
            yield "ned\n\u4e66\t"

    TerminalAnswers().ask(Fake(), "q", [])
    assert capsys.readouterr().out == "\\x1b]52;c;cHduZWQ=\\x07\\x9b2J\\u202epwned\n\u4e66\t\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_about_what_takes_long(capsys, monkeypatch, terminal):
    """In a terminal alone, and never within the text of an answer."""

    class Compiles:
        class generator:
            compile_clock = CompileClock()

        class last:
            token_ids, finish = [1, 2, 3], "length"

        def stream(self, question, images):
            for program, text in (("prefill", "a "), ("decode", "b "), ("decode", "c")):
                with self.generator.compile_clock.call(program):
                    pass
                yield text

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # one screen
    TerminalAnswers().ask(Compiles(), "q", [])
    screen = re.sub(r"\d+\.\d s", "N s", capsys.readouterr().err)
    lines = "compiling prefill ... N s\ncompiling decode ... N s\n" if terminal else ""
    cut = "the answer was cut off after 3 tokens; --max_new_tokens allows more\n"
    assert screen == f"{lines}a b c\n{cut}"
