"""A conversation in a terminal: questions, and commands that begin with a slash."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable

from internvl3_jax.data.media.given import Document, Video
from internvl3_jax.data.media.inputs import OpenedDocument, OpenedVideo
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.given_images import open_images
from internvl3_jax.inference.prompts import tag_remark, unescape
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import one_line, printable

COMMANDS = {
    "/image PATH": "show an image with the next question; may be repeated",
    "/video PATH": "show a video with the next question; may be repeated",
    "/pdf PATH": "show the pages of a PDF with the next question; may be repeated",
    "/images": "list the images, videos and PDFs that wait for the next question",
    "/forget": "take them back",
    "/undo": "take back the last question and its answer",
    "/reset": "begin a new conversation",
    "/adapter NAME": "begin a new conversation with another adapter; without a name, with none",
    "/help": "list the commands",
    "/quit": "leave, as Ctrl-D does",
}
NAMES = [command.split()[0] for command in COMMANDS]
HELP = "\n".join(
    [
        *(f"  {command:14} {meaning}" for command, meaning in COMMANDS.items()),
        r"  \n in a question is a line break. A question that begins with / has a space before it.",
        "  Ctrl-C stops an answer; the question and what was answered are dropped.",
    ]
)


class Conversation:
    """Reads questions and commands from stdin.

    Args:
      chat: the model.
      ask: prints the answer to (chat, question, images), with videos and documents after them if
        there are any.

    Attributes:
      images, videos, documents: paths that wait for the next question.
    """

    def __init__(self, chat: Chat, ask: Callable[..., None]):
        self.chat, self.ask = chat, ask
        self._forget()

    def _forget(self) -> None:
        self.images, self.videos, self.documents = [], [], []

    def run(self) -> None:
        """Reads lines until they end. An error in one ends that turn, not the conversation.

        Raises:
          KeyboardInterrupt: Ctrl-C twice in a row, or from a script.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lets input() edit lines and recall earlier ones)
            print("Ask a question; /help lists the commands.", file=sys.stderr)
        interrupted = False
        while True:
            try:
                line = input("> " if interactive else "")
                interrupted = False
                if not self.take(line):
                    return
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                if interrupted or not interactive:
                    raise
                interrupted = True
                print("\nstopped; /quit or Ctrl-D leaves", file=sys.stderr)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)

    def take(self, line: str) -> bool:
        """Takes one line; returns False if it ends the conversation. The images of a question that
        fails wait for the next one.
        """
        if line.startswith("/"):
            return self._command(line.strip())
        question = unescape(line.strip())
        if question.lower() in ("quit", "exit"):
            raise ValueError(f"write /quit to leave; a question of one word cannot be {question!r}")
        if question:
            media = self.videos, self.documents
            if remark := tag_remark(question, len(self.images), *map(len, media)):
                print(f"note: {remark}", file=sys.stderr)
            self.ask(self.chat, question, self.images, *(media if any(media) else ()))
            self._forget()
        return True

    def _command(self, line: str) -> bool:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            self.chat.reset()
            self._forget()
        elif command == "/undo":
            self.chat.undo()
            print("the last question is taken back", file=sys.stderr)
        elif command == "/forget":
            self._forget()
        elif command == "/images":
            waiting = [*self.images, *self.videos, *self.documents]
            print("\n".join(map(one_line, waiting)) or "no images", file=sys.stderr)
        elif command in ("/image", "/video", "/pdf"):
            self._add(command, argument)
        elif command == "/adapter":
            self.chat.use(argument or None)
        else:
            raise ValueError(
                f"there is no command {one_line(command)}{suggestion(command, NAMES) or '.'} "
                f"Commands: {', '.join(NAMES)}. A question that begins with / has a space before it"
            )
        return True

    def _add(self, command: str, argument: str) -> None:
        """Opens the files at once, so that a wrong path does not spoil a question."""
        waiting, example = {
            "/image": (self.images, "cat.png"),
            "/video": (self.videos, "clip.mp4"),
            "/pdf": (self.documents, "paper.pdf"),
        }[command]
        if not argument:
            raise ValueError(f"{command} needs a path, such as {command} {example}")
        paths = image_paths(argument)
        for path in paths:
            if command == "/image":
                open_images(path, self.chat.processor, self.chat.options)
            elif command == "/video":
                OpenedVideo(Video(path))
            else:
                OpenedDocument(Document(path))
        waiting += paths


def image_paths(text: str) -> list[str]:
    """Returns the path, or the paths, of a line: as typed, or with the quotes and backslashes of a
    shell, as terminals write dragged files.
    """
    as_typed = os.path.expanduser(text)
    if os.path.exists(as_typed):
        return [as_typed]
    try:
        paths = [os.path.expanduser(word) for word in shlex.split(text)]
    except ValueError:
        return [as_typed]
    if len(paths) > 1 and not any(map(os.path.exists, paths)):
        return [as_typed]
    return paths
