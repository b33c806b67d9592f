"""The two libraries behind a `Tokenizer`, with one interface: tokenizers and sentencepiece.

Attributes `added`, the added tokens by content with "id" and "special" (control tokens), and
`vocab_size`; methods `token_id`, `encode`, `decode`, `token_bytes`, `own_pieces` and
`automatic_bos`.
"""

import functools
import json
import re
from collections.abc import Iterable

import tokenizers

from internvl3_jax.data.text.tokenizer_files import TokenizerError, without_comments
from internvl3_jax.io.terminal import one_line


class HuggingFaceBackend:
    """A `tokenizers` tokenizer in which exactly the control tokens are special."""

    def __init__(self, data: dict, added: dict[str, dict], merges: str, where: str, source: str):
        if merges == "slow":
            data["model"]["merges"] = without_comments(data["model"].get("merges", []))
        data["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
        data["truncation"] = data["padding"] = None
        pre_tokenizer = data.get("pre_tokenizer") or {}
        for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
            # Scheme "first" puts a space before the start of a string, but a text of a chat block
            # follows a special token.
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        except BaseException as error:
            # The library raises plain Exception or, if it panics, only a BaseException.
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise TokenizerError(
                f"{where}/{source}: the `tokenizers` library cannot build this tokenizer: "
                f"{one_line(str(error))[:300]}"
            ) from error
        self.added = added
        for token, entry in added.items():
            assigned = self._tokenizer.token_to_id(token)
            if assigned != entry["id"]:
                raise TokenizerError(
                    f"{where}: added token {one_line(token)} should have id {entry['id']} but gets "
                    f"{assigned}; added ids must follow the vocabulary without a gap or be that of "
                    f"its entry of the same name"
                )
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each id stands for in a text; b"" for an id without a token."""
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        parts = [part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part]
        as_bytes = _of_byte_level if "ByteLevel" in parts else _of_sentencepiece
        pieces = map(self._tokenizer.id_to_token, range(self.vocab_size))
        return [
            b"" if piece is None else piece.encode() if piece in self.added else as_bytes(piece)
            for piece in pieces
        ]

    def own_pieces(self, ids: Iterable[int]) -> list[str]:
        return []

    def automatic_bos(self) -> int | None:
        ids = self._tokenizer.encode("a").ids
        return ids[0] if ids[1:] == self.encode("a") else None


class SentencePieceBackend:
    """A sentencepiece model with added tokens, as in the tokenizers of InternLM2 and InternLM3.

    Text is cut at added tokens, and the model encodes each piece by itself, with the space in front
    that it may prescribe. Follows the tokenizer class published with InternLM3.
    """

    def __init__(self, model: bytes, added: dict[str, dict], where: str):
        try:
            import sentencepiece
        except ImportError as error:
            raise TokenizerError(
                f"{where}: tokenizer.model needs the sentencepiece package; in a clone of this "
                f"repository: pip install -e '.[internlm]'"
            ) from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = one_line(str(error))[:300]
            raise TokenizerError(
                f"{where}: tokenizer.model is not a sentencepiece model: {reason}"
            ) from error
        special_ids = (
            self._model.unk_id(),
            self._model.bos_id(),
            self._model.eos_id(),
            self._model.pad_id(),
        )
        self.added = {
            self._model.id_to_piece(id): {"id": id, "special": True}
            for id in special_ids
            if id >= 0
        } | added
        self._tokens = {
            entry["id"]: (token, entry["special"]) for token, entry in self.added.items()
        }
        self._markup = {
            token: entry["id"] for token, entry in self.added.items() if not entry["special"]
        }
        self._markup_pattern = any_of(self._markup)
        self.vocab_size = max(self._model.get_piece_size(), *(id + 1 for id in self._tokens))

    def token_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]["id"]
        piece_id = self._model.piece_to_id(token)
        return None if piece_id == self._model.unk_id() else piece_id

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self._markup_pattern.split(text):
            ids += [self._markup[part]] if part in self._markup else self._model.encode(part)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text, run = "", []
        for id in ids:
            token, special = self._tokens.get(id, (None, False))
            if token is None and id < self._model.get_piece_size():
                run.append(id)
            elif token is not None and not (special and skip_special):
                text += self._model.decode(run) + token
                run = []
        return text + self._model.decode(run)

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each id stands for in a text; b"" for an id without a token."""
        size = self._model.get_piece_size()
        return [
            self._tokens[id][0].encode()
            if id in self._tokens
            else _of_sentencepiece(self._model.id_to_piece(id))
            if id < size
            else b""
            for id in range(self.vocab_size)
        ]

    def own_pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns the model file's names of ids: InternLM2's <|im_end|> is [UNUSED_TOKEN_145]."""
        return [self._model.id_to_piece(id) for id in ids if id < self._model.get_piece_size()]

    def automatic_bos(self) -> int | None:
        return self._model.bos_id() if self._model.bos_id() >= 0 else None


def any_of(tokens: Iterable[str]) -> re.Pattern:
    """Returns a pattern that captures any of the tokens, the longest first; nothing for none."""
    return re.compile(
        "(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")"
    )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Returns the byte that each letter of a byte-level vocabulary stands for (GPT-2's encoder.py):
    printable bytes are themselves, the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def _of_byte_level(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    return bytes(alphabet[letter] for letter in piece)


def _of_sentencepiece(piece: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace("\u2581", " ").encode()
