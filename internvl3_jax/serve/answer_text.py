"""Splits an answer's text into reasoning and content while it comes."""

from internvl3_jax.data.text.reasoning import END, START, split_reasoning


class AnswerText:
    """Takes text piece by piece. What comes out, joined, is `split_reasoning` of the whole text,
    without white space at both ends, as of `Chat`.

    With thinking, a text that lacks its <think> is held back until its </think>.

    Attributes:
      reasoning: certain so far; None if there is none.
      content: certain so far.
      is_cut: whether the text ended within its reasoning.
    """

    def __init__(self, thinking: bool):
        self.reasoning: str | None = None
        self.content = ""
        self.is_cut = False
        self._thinking = thinking
        self._text = ""

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """Takes more text; returns the reasoning and the content that have become certain.

        final: whether the text ends here.
        """
        self._text += text
        if final:
            parts = split_reasoning(self._text.strip(), self._thinking)
            reasoning, content, self.is_cut = parts
        else:
            reasoning, content = self._certain()
        new = (reasoning or "")[len(self.reasoning or "") :], content[len(self.content) :]
        self.reasoning, self.content = reasoning, content
        return new

    def _certain(self) -> tuple[str | None, str]:
        text = self._text.lstrip()
        if START.startswith(text):  # may become <think>
            return None, ""
        begins = text.startswith(START)
        if not begins and not self._thinking:
            return None, text.rstrip()
        if END not in text:
            if not begins:
                return None, ""
            return _without_beginning(text.removeprefix(START), END).strip(), ""
        reasoning, _, content = text.partition(END)
        return reasoning.removeprefix(START).strip(), content.strip()


def _without_beginning(text: str, end: str) -> str:
    """Returns a text without what may be the beginning of `end`."""
    for size in range(min(len(end) - 1, len(text)), 0, -1):
        if end.startswith(text[-size:]):
            return text[:-size]
    return text
