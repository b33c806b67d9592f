"""Answers that match a grammar, by llguidance: which tokens may come next.

JSON may have white space between its parts, but not without end: a model that prefers white space
would never finish.
"""

import json
import re

import llguidance
import numpy as np
from jaxtyping import Bool

from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io.terminal import one_line
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.grammar_fields import GrammarText

_WHITESPACE = r"[ \n\t]{0,16}"


class Vocabulary:
    """The tokens of a model as bytes.

    Args:
      tokenizer: of the checkpoint.
      size: number of the model's logits; ids beyond the tokenizer's are never allowed.
      stop_ids: ids that may end an answer.

    Attributes:
      token_bytes: of each id.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, stop_ids: tuple[int, ...]):
        self.size, self.stop_ids = size, stop_ids
        self.token_bytes = tokenizer.token_bytes()
        self.library = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Library(tokenizer, self.token_bytes, stop_ids[0])),
            eos_token=list(stop_ids),
        )

    def constraint(self, grammar: GrammarText) -> "GrammarConstraint":
        """Compiles a grammar.

        Raises:
          ApiError: it is none, or is too complex.
        """
        try:
            compiled = _compile(grammar)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        matcher = llguidance.LLMatcher(self.library, compiled, log_level=0)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return GrammarConstraint(self, matcher, grammar.field)


class _Library:
    """A tokenizer with the names that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos_id: int):
        self.tokens = tokens
        self.special_token_ids = sorted(tokenizer.control_ids)
        self.eos_token_id, self.bos_token_id = eos_id, None
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(text, special=False)


class GrammarConstraint:
    """A `TokenConstraint` of one answer."""

    def __init__(self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, field: str):
        self._vocabulary, self._matcher, self._field = vocabulary, matcher, field

    def copy(self) -> "GrammarConstraint":
        """Returns one for another answer, at the same place."""
        return GrammarConstraint(self._vocabulary, self._matcher.deep_copy(), self._field)

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Returns which ids may come next.

        Raises:
          ValueError: the grammar became too complex.
        """
        allowed = np.zeros(self._vocabulary.size, bool)
        if self._matcher.is_error():
            raise ValueError(f"{self._field}: {self._matcher.get_error()}; simplify it")
        if self._matcher.is_stopped():
            allowed[list(self._vocabulary.stop_ids)] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        flags = np.unpackbits(bits, bitorder="little").astype(bool)
        count = min(len(flags), len(allowed))
        allowed[:count] = flags[:count]
        return allowed

    def accept(self, token: int) -> None:
        """Takes the token that was sampled."""
        if token not in self._vocabulary.stop_ids:
            self._matcher.consume_token(token)


def _compile(grammar: GrammarText) -> str:
    if grammar.kind == "json":
        json.loads(grammar.text)  # its errors say where
        return llguidance.LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"whitespace_pattern": _WHITESPACE}
        )
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        choices = "|".join(f"(?:{re.escape(text)})" for text in json.loads(grammar.text))
        return llguidance.LLMatcher.grammar_from_regex(choices)
    return llguidance.LLMatcher.grammar_from_lark(grammar.text)


def _refused(grammar: GrammarText, reason: str) -> ApiError:
    reason = one_line(" ".join(reason.split()))[:300]
    return ApiError(
        f"{grammar.field} cannot be used ({reason}); correct or simplify it",
        param=grammar.field,
        code="invalid_grammar",
    )
