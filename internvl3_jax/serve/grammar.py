"""Answers that match a grammar, by llguidance: which tokens may come next.

JSON may have white space between its parts, but not without end: a model that prefers white space
would never finish. `oneOf` is read as `anyOf`.
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
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_TRIED = 2  # tokens
_ENDS = ("NoExtension", "NoExtensionBias", "EndOfSentence")


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
        matcher = llguidance.LLMatcher(self.library, compiled, log_level=0, limits=_LIMITS)
        constraint = GrammarConstraint(self, matcher, grammar.field)
        try:
            constraint.copy().try_out()
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        return constraint


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
        # The mask may show that nothing can follow.
        bits = b"" if self._is_complete() else self._matcher.compute_bitmask()
        if self._is_complete():
            allowed[list(self._vocabulary.stop_ids)] = True
            return allowed
        bits = np.frombuffer(bits, np.uint8)
        flags = np.unpackbits(bits, bitorder="little").astype(bool)
        count = min(len(flags), len(allowed))
        allowed[:count] = flags[:count]
        return allowed

    def accept(self, token: int) -> None:
        """Takes the token that was sampled."""
        if token not in self._vocabulary.stop_ids:
            self._matcher.consume_token(token)

    def try_out(self) -> None:
        """Takes some tokens. A grammar may take seconds until it turns out too complex: this is
        called in a worker thread, so that the engine's thread does not have to wait.

        Raises:
          ValueError: the grammar is none, nothing matches it, or it is too complex.
        """
        for _ in range(_TRIED):
            may_end = self._matcher.is_accepting()
            allowed = self.allowed()
            allowed[list(self._vocabulary.stop_ids)] = False
            if not allowed.any():
                if may_end:
                    return
                raise ValueError(f"{self._field}: no text matches it; simplify it")
            self.accept(int(np.argmax(allowed)))
        self._is_complete()

    def _is_complete(self) -> bool:
        """Returns whether nothing can follow.

        Raises:
          ValueError: the grammar is none, or became too complex.
        """
        if not self._matcher.is_stopped():
            return False
        if self._matcher.stop_reason() in _ENDS:
            return True
        reason = self._matcher.get_error().split("\n<")[0]  # what follows is of its inside
        raise ValueError(f"{self._field}: {reason}; simplify it")


def _compile(grammar: GrammarText) -> str:
    if grammar.kind == "json":
        json.loads(grammar.text)  # its errors say where
        return llguidance.LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"whitespace_pattern": _WHITESPACE, "coerce_one_of": True}
        )
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        choices = "|".join(f"(?:{re.escape(text)})" for text in json.loads(grammar.text))
        return llguidance.LLMatcher.grammar_from_regex(choices)
    return llguidance.LLMatcher.grammar_from_lark(grammar.text)


def _refused(grammar: GrammarText, reason: str) -> ApiError:
    reason = reason.removeprefix(f"{grammar.field}: ").removesuffix("; simplify it")
    reason = one_line(" ".join(reason.split()))[:300]
    return ApiError(
        f"{grammar.field} cannot be used ({reason}); correct or simplify it",
        param=grammar.field,
        code="invalid_grammar",
    )
