"""Prints the answers of infer.py: text as it is generated, or JSON; statistics and remarks go to
stderr.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from internvl3_jax.inference.answer import cut_reasoning
from internvl3_jax.inference.answerer import as_json
from internvl3_jax.inference.answering import note
from internvl3_jax.inference.chat import Answer, Chat
from internvl3_jax.inference.draw_answer import draw_answer
from internvl3_jax.inference.progress import progress_line
from internvl3_jax.inference.turn import Turn
from internvl3_jax.io import jsonl
from internvl3_jax.io.terminal import printable


@dataclasses.dataclass
class TerminalAnswers:
    """Asks and prints.

    Attributes:
      json: print one JSON object per answer instead of the text.
      stats: print times and token counts to stderr.
      draw: file for the image with the answer's boxes; None: none is written.
      draw_tiles: with `draw`, draw the grid of tiles, too.
    """

    json: bool = False
    stats: bool = False
    draw: str | None = None
    draw_tiles: bool = False

    def ask(self, chat: Chat, question: str, images: Sequence[str], *media) -> None:
        """Prints the answer to the next question of a conversation. media: videos, documents."""
        turns = []
        chat.on_turn = lambda turn: self._show_plan(turns, turn)
        for piece in self._pieces(chat, question, images, *media):
            if not self.json:
                print(printable(piece), end="", flush=True)
        answer = chat.last
        print(jsonl.dumps(as_json(answer)) if self.json else "", flush=True)
        if self.draw:
            path, images = pathlib.Path(os.path.expanduser(self.draw)), turns[-1].images
            for line in draw_answer(answer, images, chat.processor, path, self.draw_tiles):
                note(f"note: {line}")
        if self.stats:
            note(stats_line(answer))
        if answer.finish == "reasoning":
            note(
                f"{cut_reasoning(answer)}; --max_new_tokens allows more. The conversation "
                "continues without this question"
            )
        if answer.finish == "length" and not self.json:
            note(
                f"the answer was cut off after {len(answer.token_ids)} tokens; --max_new_tokens "
                "allows more"
            )

    def _show_plan(self, turns: list[Turn], turn: Turn) -> None:
        """Prints the plan of a question, and keeps its images if they are drawn."""
        if self.draw:
            turns.append(turn)
        if turn.plan:
            note(f"note: {turn.plan.line()}")

    def ask_best(
        self, choose: Callable[[list], list], question: str, images: Sequence[str]
    ) -> None:
        """Prints the best of several answers. choose: takes a list of (question, images)."""
        (choice,) = choose([(question, images)])
        print(jsonl.dumps(choice.as_json()) if self.json else printable(choice.text))
        if choice.candidates[choice.best].finish == "reasoning":
            note("all candidates ended within their reasoning; --max_new_tokens allows more")
        if self.stats:
            note(choice.table())

    def _pieces(self, chat: Chat, question: str, *inputs) -> Iterator[str]:
        """Yields the text, with a line on stderr whenever a program is compiled."""
        clock = chat.generator.compile_clock
        clock.progress = lambda program: progress_line(f"compiling {program}")
        known = clock.num_programs
        pieces = chat.stream(question, *inputs)
        first = next(pieces, "")
        # The decode loop is probably compiled next: its line must not come after the first token.
        yield first + next(pieces, "") if clock.num_programs > known else first
        yield from pieces


def stats_line(answer: Answer) -> str:
    """Returns times and token counts; the times do not include compilation."""
    per_token = "one token"
    if answer.seconds_per_token:
        per_token = f"{1000 * answer.seconds_per_token:.1f} ms per token"
    following = len(answer.token_ids) - 1
    runs = f" in {answer.model_runs} runs" if answer.model_runs < following else ""
    compressed = f" ({answer.compressed_tiles} compressed)" if any(answer.compressed_tiles) else ""
    compiled = f"compiled in {answer.compile_seconds:.3f} s; " if answer.compile_seconds else ""
    return (
        f"{compiled}first token {answer.first_token_seconds:.3f} s, then {per_token}{runs}; "
        f"{answer.prompt_tokens} prompt tokens ({answer.reused_tokens} reused), tiles "
        f"{answer.tiles}{compressed}, {len(answer.token_ids)} new tokens in {answer.seconds:.3f} s, finish: "
        f"{answer.finish}"
    )
