"""A conversation in a terminal: questions, and commands that begin with a slash."""

import os
import shlex
import sys
from collections.abc import Callable

from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.given_images import open_images
from internvl3_jax.inference.prompts import typed
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import one_line, printable

COMMANDS = {
    "/image PATH": "show an image with the next question; may be repeated",
    "/images": "list the images that wait for the next question",
    "/forget": "take them back",
    "/reset": "begin a new conversation",
    "/adapter NAME": "answer with another adapter, without a name with none; begins a new conversation",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
NAMES = [command.split()[0] for command in COMMANDS]
HELP = "\n".join(
    [
        *(f"  {command:14} {what}" for command, what in COMMANDS.items()),
        r"  \n in a question is a line break. A question that begins with / has a space before it. Ctrl-C stops an answer.",
    ]
)


class Conversation:
    """Args:
    chat: that answers.
    ask: prints the answer to (chat, question, images).
    """

    def __init__(self, chat: Chat, ask: Callable[[Chat, str, list[str]], None]):
        self.chat, self.ask, self.images = chat, ask, []

    def run(self) -> None:
        """Reads lines from the terminal until they end. What is wrong with one ends that turn, not
        the conversation.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            print("Ask a question; /help lists the commands.", file=sys.stderr)
        stopped = False
        while True:
            try:
                line = input("> ")
                stopped = False
                if not self.take(line):
                    return
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                if stopped or not interactive:  # twice in a row, or from a script
                    raise
                stopped = True
                print("\nstopped; /quit or Ctrl-D leaves", file=sys.stderr)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)

    def take(self, line: str) -> bool:
        """One line; False if it ends the conversation. The images of a question that fails stay for
        the next one.
        """
        if line.startswith("/"):
            return self._command(line.strip())
        question = typed(line.strip())
        if question.lower() in ("quit", "exit"):
            raise ValueError("/quit leaves; with a space and more words it is asked")
        if question:
            self.ask(self.chat, question, self.images)
            self.images = []
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
            self.images = []
        elif command == "/forget":
            self.images = []
        elif command == "/images":
            print("\n".join(map(one_line, self.images)) or "no images", file=sys.stderr)
        elif command == "/image":
            self._show(argument)
        elif command == "/adapter":
            self.chat.use(argument or None)
        else:
            near = suggestion(command, NAMES)
            raise ValueError(
                f"there is no command {one_line(command)}{near}; there are {', '.join(NAMES)}. A question that begins with / has a "
                f"space before it"
            )
        return True

    def _show(self, argument: str) -> None:
        if not argument:
            raise ValueError("/image needs a path, such as /image cat.png")
        paths = image_paths(argument)
        for path in paths:
            open_images(path, self.chat.processor, self.chat.options)
        self.images += paths


def image_paths(text: str) -> list[str]:
    """The path, or the paths, of a line: as typed, or with the quotes and backslashes of a shell,
    as terminals write dragged files.
    """
    whole = os.path.expanduser(text)
    if os.path.exists(whole):
        return [whole]
    try:
        parts = [os.path.expanduser(part) for part in shlex.split(text)]
    except ValueError:
        return [whole]
    if len(parts) > 1 and not any(map(os.path.exists, parts)):
        return [whole]
    return parts
