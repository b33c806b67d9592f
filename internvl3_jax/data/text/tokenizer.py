"""Encodes text to ids and decodes ids, by the tokenizer files of a checkpoint.

Three layouts are read: `tokenizer.json`; `vocab.json` + `merges.txt`, as in the released
Qwen2.5-based checkpoints; and the sentencepiece `tokenizer.model` of InternLM2 and InternLM3. Added
tokens come from tokenizer.json, tokenizer_config.json and added_tokens.json, which must agree on
every id.

An added token is either

  control  one that steers the model: <img>, </img>, <IMG_CONTEXT>, <|im_start|>, <|im_end|>,
           <|endoftext|>, the others that Qwen2.5 and InternLM reserve (<|vision_start|>, <s>, <unk>
           ...), and those that the files name as bos, eos, pad and so on. Text of a user never
           becomes one: `encode(text, special=False)` encodes its spelling in ordinary pieces.
  markup   any other: <ref>, <box>, <quad> and their ends, which belong in prompts
           (`<ref>a dog</ref>`) and answers although the released files mark them as special; Qwen's
           <tool_call>, <|fim_prefix|> and so on; and tokens that the owner of a checkpoint added.
           Each is one id in any text.

`decode(..., skip_special=True)` leaves out control tokens and keeps markup, so that a grounding
answer is readable and encodes to the same ids again. (InternVL's decode drops <ref> and <box> too.)

internvl3_jax_tokenizer.json, {"merges": "slow"}, reads merges.txt as the slow tokenizer of
transformers before 4.40, with which the released models were trained: without the rules that begin
with #, so that a Markdown heading is encoded as single #.

`encode` never adds bos, and encodes a text as one that follows a special token, as every text of a
chat block does. So the ids of text pieces and control tokens, joined, are the ids of the whole
string.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from internvl3_jax.data.text.tokenizer_backends import (
    HuggingFaceBackend,
    SentencePieceBackend,
    any_of,
)
from internvl3_jax.data.text.tokenizer_files import (
    FILES,
    MERGES,
    OPTIONS,
    TokenizerError,
    added_tokens,
    check_named_tokens,
    check_tokenizer_json,
    qwen2_layout,
    read_json,
    read_merges,
)
from internvl3_jax.io.model_files import exists, read_file
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.strict_json import JsonError, Object

# A decoder writes this for a character of which the last bytes are missing.
UNFINISHED = "\ufffd"


class Tokenizer:
    """A tokenizer of a checkpoint; made by `from_directory` or `from_files`.

    Threads may share it, and it can be sent to other processes.
    """

    def __init__(
        self,
        backend,
        control: dict[str, int],
        bos_id: int | None,
        files: dict[str, bytes],
        where: str,
        merges: str = MERGES[0],
    ):
        self._backend = backend
        self.merges = merges  # which merge rules are used; see tokenizer_files.MERGES
        self._control = control
        self._control_ids = frozenset(self._control.values())
        self._control_pattern = any_of(self._control)
        self._spellings = any_of({*self._control, *backend.own_pieces(self._control_ids)})
        self._files = files
        self._where = where
        # InternLM2 and 3 put it before the first chat block; None for Qwen2.5.
        self.bos_id = bos_id

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer files of a checkpoint directory.

        Raises:
          TokenizerError: A file is missing or wrong.
        """
        path = as_path(path) if is_remote(path) else Path(path)
        if not path.is_dir():
            raise TokenizerError(f"{path} is not a directory; give the checkpoint's directory")
        return cls.from_files(
            {name: read_file(path / name) for name in FILES if exists(path / name)}, str(path)
        )

    @classmethod
    def from_files(cls, files: dict[str, bytes], where: str = "tokenizer files") -> "Tokenizer":
        """Reads the files that `files()` returned, as `from_directory`; ignores other files."""
        files = {name: files[name] for name in FILES if name in files}
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        )
        data, config, *others = (read_json(files, name, where) for name in names)
        try:
            merges = read_merges(files, where)
            backend = cls._backend_of(
                files, data, config, added_tokens(data, config, *others, where), merges, where
            )
            adds_bos = config.get("add_bos_token", bool, True)
            check_named_tokens(config, backend.token_id)
        except JsonError as error:
            raise TokenizerError(str(error)) from error
        control = {token: entry["id"] for token, entry in backend.added.items() if entry["special"]}
        return cls(
            backend, control, backend.automatic_bos() if adds_bos else None, files, where, merges
        )

    @staticmethod
    def _backend_of(
        files: dict[str, bytes], data: Object, config: Object, added: dict, merges: str, where: str
    ):
        if data.values:
            check_tokenizer_json(data)
            return HuggingFaceBackend(data.values, added, merges, where, "tokenizer.json")
        if "vocab.json" in files or "merges.txt" in files:
            made = qwen2_layout(files, config, added, where)
            return HuggingFaceBackend(made, added, merges, where, "vocab.json and merges.txt")
        if "tokenizer.model" in files:
            if merges != MERGES[0]:
                raise TokenizerError(
                    f"{where}/{OPTIONS}: merges is {merges!r}, but a tokenizer.model has no "
                    f"merges; remove that file"
                )
            return SentencePieceBackend(files["tokenizer.model"], added, where)
        raise TokenizerError(
            f"{where} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, "
            f"or tokenizer.model"
        )

    def __reduce__(self):
        # A pickled tokenizers.Tokenizer loses encode_special_tokens, so that user text could become
        # control tokens.
        return Tokenizer.from_files, (self._files, self._where)

    @property
    def vocab_size(self) -> int:
        """Returns the number of ids with added tokens: 151,674 for the released Qwen2.5
        checkpoints.
        """
        return self._backend.vocab_size

    def files(self) -> dict[str, bytes]:
        """Returns the files of this tokenizer by name, to be stored with a checkpoint."""
        return dict(self._files)

    def token_id(self, token: str) -> int:
        """Returns the id of a vocabulary entry or added token. TokenizerError if it is unknown."""
        self.require(token)
        return self._backend.token_id(token)

    def require(self, *tokens: str) -> None:
        """Raises TokenizerError naming every token of `tokens` that has no id of its own."""
        missing = [token for token in tokens if self._backend.token_id(token) is None]
        if missing:
            raise TokenizerError(
                f"{self._where}: the tokenizer has no token {', '.join(missing)}; if it is the "
                f"plain language model's, add them to its added_tokens.json with ids from "
                f"{self.vocab_size} on"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encodes a text without bos.

        special: Whether the spelling of a control token becomes the token; False for text of users.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode: half a surrogate pair, "
                f"U+{ord(text[error.start]):04X}, at index {error.start}"
            ) from error
        if not special:
            return self._encode_spelled(text)
        ids = []
        for part in self._control_pattern.split(text):
            ids += [self._control[part]] if part in self._control else self._backend.encode(part)
        return ids

    def _encode_spelled(self, text: str) -> list[int]:
        ids = self._backend.encode(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The model file has a control token among its ordinary pieces. A spelling that is cut in
        # two cannot match it.
        cuts = [0, *(match.start() + 1 for match in self._spellings.finditer(text)), len(text)]
        return [
            id
            for start, end in zip(cuts, cuts[1:], strict=False)
            for id in self._backend.encode(text[start:end])
        ]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode([int(id) for id in ids], skip_special)

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each id stands for in a text, a control token those of its
        spelling; b"" for an id without a token.
        """
        return self._backend.token_bytes()

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return self._control_ids

    def stream(self, skip_special: bool = True) -> "TextStream":
        """Returns a decoder of ids that arrive one by one; see TextStream."""
        return TextStream(lambda ids: self.decode(ids, skip_special))


class TextStream:
    """Decodes ids that arrive one by one; all pieces and the flush equal `decode` of all ids.

    Ids that end within a character give no text until its last byte has arrived.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._start()

    def _start(self):
        # The ids of the last piece, without which the next ones may decode differently.
        self._before = []
        self._pending = []  # ids without text so far

    def step(self, id: int) -> str | None:
        """Takes the next id; returns the text that it completes, or None."""
        self._pending.append(int(id))
        piece = self._new_text()
        if not piece or piece.endswith(UNFINISHED):
            return None
        self._before, self._pending = self._pending, []
        return piece

    def flush(self) -> str:
        """Returns the remaining text, with U+FFFD for incomplete characters, and starts again."""
        piece = self._new_text()
        self._start()
        return piece

    def _new_text(self) -> str:
        return self._decode(self._before + self._pending)[len(self._decode(self._before)) :]
