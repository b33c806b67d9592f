"""Thinking mode: the system text that asks for reasoning, and how it is split from the answer.

InternVL3.5 reasons if the system message asks for it, and encloses the reasoning in <think> and
</think> (https://huggingface.co/OpenGVLab/InternVL3_5-8B, "Thinking Mode").
"""

from typing import NamedTuple

# From the model cards. It is also published without the empty lines; a system message of the caller
# replaces it.
THINKING_SYSTEM = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential "
    "solutions, and reason through the problem step-by-step. Enclose this entire thinking process "
    "within <think> and </think> tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's "
    "question. Separate the answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final "
    "answer should be standalone and not reference the thinking section."
)
# From the model cards, against repetition.
THINKING_TEMPERATURE = 0.6
START, END = "<think>", "</think>"


class Parts(NamedTuple):
    """A generated text, split.

    Attributes:
      reasoning: The text between <think> and </think>, or after <think> if that does not end; None
        if there is none.
      answer: The text after </think>; "" if the reasoning does not end.
      is_cut: Whether the reasoning does not end.
    """

    reasoning: str | None
    answer: str
    is_cut: bool = False


def split_reasoning(text: str, thinking: bool = False) -> Parts:
    """Splits the reasoning that a text begins with from the answer.

    Args:
      thinking: Whether reasoning was asked for. Then it may lack its <think>.
    """
    reasoning, end, answer = text.partition(END)
    begins = reasoning.lstrip().startswith(START)
    if not begins and not (thinking and end):
        return Parts(None, text)
    reasoning = reasoning.lstrip().removeprefix(START).strip()
    return Parts(reasoning, answer.lstrip(), is_cut=not end)
