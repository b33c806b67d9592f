"""Text to ids and back, from a checkpoint's own tokenizer files.

Three layouts are read: `tokenizer.json`; `vocab.json` + `merges.txt`, which the released
Qwen2.5-based checkpoints carry; and the sentencepiece `tokenizer.model` of InternLM2 and InternLM3.
Added tokens come from tokenizer.json, tokenizer_config.json and added_tokens.json, which must agree
on every id.

An added token is either
  control  what steers the model: <img>, </img>, <IMG_CONTEXT>, <|im_start|>, <|im_end|>, <|endoftext|>, what else Qwen2.5 and InternLM
           reserve (<|vision_start|>, <s>, <unk> ...), and what the files name as bos, eos, pad and
           so on. What a user types must never become one: `encode(text, special=False)` spells them
           out in ordinary pieces.
  markup   the rest: <ref>, <box>, <quad> and their ends, which belong in prompts (`<ref>a
  dog</ref>`) and in answers although
           the released files mark them as special, Qwen's <tool_call>, <|fim_prefix|> and so on,
           and tokens that a checkpoint's owner added, special or not. One id each in any text.
`decode(..., skip_special=True)` leaves out control tokens and keeps markup: a grounding answer
stays readable and encodes to the same ids again. (The reference's decode drops <ref> and <box> as
well.)

internvl3_jax_tokenizer.json, {"merges": "slow"}, reads merges.txt as the slow tokenizer of
transformers before 4.40 did, with which the released models were trained: without the rules that
begin with #, so that a Markdown heading is single #.

`encode` never adds bos, and takes its text as one that follows a special token, as every text in a
chat block does. So text pieces and control ids put together are exactly the ids of the whole
string.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers

from internvl3_jax.data.text.tokenizer_files import (
    FILES,
    MERGES,
    OPTIONS,
    TokenizerError,
    added_tokens,
    check_tokenizer_json,
    qwen2_layout,
    read_json,
    read_merges,
    without_comments,
)
from internvl3_jax.io.model_files import exists, read_file
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.strict_json import JsonError, Object
from internvl3_jax.io.terminal import one_line

# what a decoder writes for the first bytes of a character whose last bytes are yet to come
UNFINISHED = "\ufffd"


class Tokenizer:
    """Use `from_directory` or `from_files`. Safe to share between threads and to send to worker
    processes.
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
        self.merges = merges  # which of its rules for merging count; see tokenizer_files.MERGES
        self._control = control
        self._control_ids = frozenset(self._control.values())
        self._control_pattern = _any_of(self._control)
        self._spellings = _any_of({*self._control, *backend.own_pieces(self._control_ids)})
        self._files = files
        self._where = where
        # InternLM2 and 3 put it once before the first chat block; None for Qwen2.5
        self.bos_id = bos_id

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer files of a checkpoint directory. TokenizerError says which file is
        missing or wrong.
        """
        path = as_path(path) if is_remote(path) else Path(path)
        if not path.is_dir():
            raise TokenizerError(f"{path} is not a directory; give the checkpoint's directory")
        return cls.from_files(
            {name: read_file(path / name) for name in FILES if exists(path / name)}, str(path)
        )

    @classmethod
    def from_files(cls, files: dict[str, bytes], where: str = "tokenizer files") -> "Tokenizer":
        """As `from_directory`, from what `files()` returned. Files that are of no tokenizer are not
        looked at.
        """
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
            return _HuggingFace(data.values, added, merges, where, "tokenizer.json")
        if "vocab.json" in files or "merges.txt" in files:
            made = qwen2_layout(files, config, added, where)
            return _HuggingFace(made, added, merges, where, "vocab.json and merges.txt")
        if "tokenizer.model" in files:
            if merges != MERGES[0]:
                raise TokenizerError(
                    f"{where}/{OPTIONS}: merges is {merges!r}, but a tokenizer.model has no merges; remove that file"
                )
            return _SentencePiece(files["tokenizer.model"], added, where)
        raise TokenizerError(
            f"{where} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, or tokenizer.model"
        )

    def __reduce__(self):
        # A pickled tokenizers.Tokenizer forgets encode_special_tokens, and with it that user text
        # holds no control token.
        return Tokenizer.from_files, (self._files, self._where)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: 151,674 for the released Qwen2.5-based checkpoints."""
        return self._backend.vocab_size

    def files(self) -> dict[str, bytes]:
        """The files this tokenizer was made from, by name, to travel with a checkpoint."""
        return dict(self._files)

    def token_id(self, token: str) -> int:
        """Id of one vocabulary entry or added token. TokenizerError names it if there is none."""
        self.require(token)
        return self._backend.token_id(token)

    def require(self, *tokens: str) -> None:
        """Raises TokenizerError naming every token of `tokens` that has no id of its own."""
        missing = [token for token in tokens if self._backend.token_id(token) is None]
        if missing:
            raise TokenizerError(
                f"{self._where}: the tokenizer has no token {', '.join(missing)}; if it is the plain language model's, add "
                f"them to its added_tokens.json with ids from {self.vocab_size} on"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text, without bos.

        With special=False, for what people typed, a control token's spelling gives ordinary pieces
        and never the token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode: half a surrogate pair, U+{ord(text[error.start]):04X}, at index {error.start}"
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
        # The model file itself holds a control token among its ordinary pieces. A spelling cut in
        # two cannot match it.
        cuts = [0, *(match.start() + 1 for match in self._spellings.finditer(text)), len(text)]
        return [
            id
            for start, end in zip(cuts, cuts[1:], strict=False)
            for id in self._backend.encode(text[start:end])
        ]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self._backend.decode([int(id) for id in ids], skip_special)

    def stream(self, skip_special: bool = True) -> "TextStream":
        """Decodes ids one at a time; see TextStream."""
        return TextStream(lambda ids: self.decode(ids, skip_special))


class TextStream:
    """Text of ids that arrive one by one. All pieces and the flush together equal `decode` of all
    ids.

    Ids may hold part of a character; the stream keeps them back until its last byte is there.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._start()

    def _start(self):
        # the ids of the last piece: what comes next may read differently without them
        self._before = []
        self._pending = []  # ids that gave no text yet

    def step(self, id: int) -> str | None:
        """Takes the next id; returns the text it completes, or None."""
        self._pending.append(int(id))
        piece = self._new_text()
        if not piece or piece.endswith(UNFINISHED):
            return None
        self._before, self._pending = self._pending, []
        return piece

    def flush(self) -> str:
        """Text of what is pending, with U+FFFD where a character never got its last byte. Then the
        stream starts anew.
        """
        piece = self._new_text()
        self._start()
        return piece

    def _new_text(self) -> str:
        return self._decode(self._before + self._pending)[len(self._decode(self._before)) :]


class _HuggingFace:
    """A `tokenizers` tokenizer in which exactly the control tokens are special."""

    def __init__(self, data: dict, added: dict[str, dict], merges: str, where: str, source: str):
        if merges == "slow":
            data["model"]["merges"] = without_comments(data["model"].get("merges", []))
        data["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
        data["truncation"] = data["padding"] = None
        pre_tokenizer = data.get("pre_tokenizer") or {}
        for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
            # Scheme "first" puts a space before the very start of a string, which in a chat block
            # is a special token.
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        except BaseException as error:
            # the library raises plain Exception, and where it panics not even that
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise TokenizerError(
                f"{where}/{source}: the `tokenizers` library cannot build this tokenizer: {one_line(str(error))[:300]}"
            ) from error
        self.added = added
        for token, entry in added.items():
            found = self._tokenizer.token_to_id(token)
            if found != entry["id"]:
                raise TokenizerError(
                    f"{where}: added token {one_line(token)} should have id {entry['id']} but gets {found}; added ids must follow the "
                    f"vocabulary without a gap or be that of its entry of the same name"
                )
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def own_pieces(self, ids: Iterable[int]) -> list[str]:
        return []

    def automatic_bos(self) -> int | None:
        ids = self._tokenizer.encode("a").ids
        return ids[0] if ids[1:] == self.encode("a") else None


class _SentencePiece:
    """A sentencepiece model with added tokens around it, as the tokenizer classes of InternLM2 and
    InternLM3 combine them.

    Text is cut at added tokens and each piece goes through the model by itself, with the space in
    front that the model may prescribe. Source: the tokenizer class published with InternLM3.
    """

    def __init__(self, model: bytes, added: dict[str, dict], where: str):
        try:
            import sentencepiece
        except ImportError as error:
            raise TokenizerError(
                f"{where}: tokenizer.model needs the sentencepiece package; in a clone of this repository: pip install -e '.[internlm]'"
            ) from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = one_line(str(error))[:300]
            raise TokenizerError(
                f"{where}: tokenizer.model is not a sentencepiece model: {reason}"
            ) from error
        own = (
            self._model.unk_id(),
            self._model.bos_id(),
            self._model.eos_id(),
            self._model.pad_id(),
        )
        self.added = {
            self._model.id_to_piece(id): {"id": id, "special": True} for id in own if id >= 0
        } | added
        self._tokens = {
            entry["id"]: (token, entry["special"]) for token, entry in self.added.items()
        }
        self._markup = {
            token: entry["id"] for token, entry in self.added.items() if not entry["special"]
        }
        self._markup_pattern = _any_of(self._markup)
        self.vocab_size = max(self._model.get_piece_size(), *(id + 1 for id in self._tokens))

    def token_id(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]["id"]
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() else found

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

    def own_pieces(self, ids: Iterable[int]) -> list[str]:
        """What the model file calls these ids: InternLM2's <|im_end|> is [UNUSED_TOKEN_145] there."""
        return [self._model.id_to_piece(id) for id in ids if id < self._model.get_piece_size()]

    def automatic_bos(self) -> int | None:
        return self._model.bos_id() if self._model.bos_id() >= 0 else None


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Matches and captures any of the tokens, the longest first; with none of them, nothing."""
    return re.compile(
        "(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")"
    )
