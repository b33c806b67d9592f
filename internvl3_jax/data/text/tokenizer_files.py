"""Reads and checks the tokenizer files of a checkpoint; tokenizer.py makes a tokenizer of them."""

import json
from collections.abc import Callable

from internvl3_jax.io.strict_json import JsonError, Object, check, decode, loads
from internvl3_jax.io.terminal import excerpt, one_line

# Tokens that steer the model. Text of a user never becomes one of these.
ALWAYS_CONTROL = frozenset(
    """<img> </img> <IMG_CONTEXT> <|im_start|> <|im_end|> <|endoftext|>
    <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>
    <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
    <s> </s> <unk> <pad>
    <|action_start|> <|action_end|> <|interpreter|> <|plugin|>""".split()
)
# Settings that name one token each, which is then a control token as well.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# All files of a tokenizer, read here or only stored with a checkpoint.
FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenization_internlm2.py",
    "tokenization_internlm2_fast.py",
    "tokenization_internlm3.py",
)
OPTIONS = "internvl3_jax_tokenizer.json"  # written here: how the other files are read
FILES += (OPTIONS,)
# Which rules of merges.txt are used. The slow tokenizer of transformers before 4.40, with which
# InternVL 2.5 and 3 were trained (4.37.2), took the lines that begin with # for comments.
MERGES = ("all", "slow")
# The part of Qwen2's tokenizer that its vocab.json and merges.txt do not contain.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LARGEST_ID = 1 << 24
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_MISFIT = "one of the two files is cut short or from another tokenizer"


class TokenizerError(ValueError):
    """Tokenizer files that cannot be used, or a token or text that they do not cover."""


def read_json(files: dict[str, bytes], name: str, where: str) -> Object:
    """Returns the object of a JSON file, or an empty one if the file is missing."""
    place = one_line(f"{where}/{name}")
    try:
        return Object(loads(files.get(name, b"{}"), place), place)
    except JsonError as error:
        raise TokenizerError(f"{error}; the file is damaged") from error


def read_merges(files: dict[str, bytes], where: str) -> str:
    """Returns which rules of merges.txt are used: one of MERGES."""
    options = read_json(files, OPTIONS, where)
    choice = options.get("merges", str, MERGES[0], choices=MERGES)
    options.finish()
    return choice


def with_merges(files: dict[str, bytes], merges: str) -> dict[str, bytes]:
    """Returns the tokenizer files with those rules of merges.txt selected."""
    others = {name: content for name, content in files.items() if name != OPTIONS}
    if merges not in MERGES:
        raise TokenizerError(f"merges is {excerpt(merges)}; expected one of {', '.join(MERGES)}")
    return (
        others
        if merges == MERGES[0]
        else others | {OPTIONS: json.dumps({"merges": merges}).encode()}
    )


def named_token(settings: dict, name: str, where: str) -> str | None:
    """Returns a token that tokenizer_config.json names as a text or as an added token."""
    value = Object(settings, where).get(name, (str, dict), None)
    return (
        Object(value, f"{where}: {name}").get("content", str) if isinstance(value, dict) else value
    )


def added_tokens(
    data: Object, config: Object, added_ids: Object, special_map: Object, where: str
) -> dict[str, dict]:
    """Returns all added tokens by content, in the form of tokenizer.json.

    "special" is true for control tokens only: those of `ALWAYS_CONTROL` and those that the files
    name as bos, eos, pad and so on. Others that the files mark as special were added by the owner
    of the checkpoint, and are one id in any text.

    Args:
      data, config, added_ids, special_map: The contents of tokenizer.json, tokenizer_config.json,
        added_tokens.json and special_tokens_map.json.
    """
    added, ids = {}, {}
    decoder = check(
        config.values.get("added_tokens_decoder", {}), dict, f"{config.where}: added_tokens_decoder"
    )
    entries = [
        (entry, f"{data.where}: added_tokens[{index}]")
        for index, entry in enumerate(data.get("added_tokens", list, []))
    ]
    for id, entry in decoder.items():
        place = f"{config.where}: added_tokens_decoder: {excerpt(id)}"
        if not (id.isascii() and id.isdigit() and len(id) < 9):
            raise JsonError(f"{place} is not an id of a token; expected a whole number")
        entries.append(({**check(entry, dict, place), "id": int(id)}, place))
    for values, place in entries:
        _add(added, ids, _entry(values, place), where)
    for token, id in added_ids.values.items():
        check(id, int, f"{added_ids.where}: {excerpt(token)}", low=0, high=_LARGEST_ID)
        _add(added, ids, {"id": id, "content": token, **dict.fromkeys(_FLAGS, False)}, where)
    control = ALWAYS_CONTROL | {
        named_token(file.values, name, file.where)
        for file in (config, special_map)
        for name in NAMED
    }
    for token, entry in added.items():
        entry["special"] = token in control
    return added


def check_named_tokens(config: Object, token_id: Callable[[str], int | None]) -> None:
    """Raises TokenizerError for a token that tokenizer_config.json names and that has no id."""
    named = {key: [named_token(config.values, key, config.where)] for key in NAMED}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key, (list, dict), None) or []
        tokens = tokens.values() if isinstance(tokens, dict) else tokens
        named[key] = [named_token({key: token}, key, config.where) for token in tokens]
    for key, tokens in named.items():
        for token in tokens:
            if token and token_id(token) is None:
                raise TokenizerError(
                    f"{config.where}: {key} names {excerpt(token)}, which has no id in any file "
                    f"(transformers gives it the next free one); add it to added_tokens.json with "
                    f"the id that it was trained with"
                )


def _entry(values, where: str) -> dict:
    """Checks an added token."""
    fields = Object(values, where)
    fields.get("special", bool, None)
    flags = {name: fields.get(name, bool, False) for name in _FLAGS}
    return {
        "id": fields.get("id", int, low=0, high=_LARGEST_ID),
        "content": fields.get("content", str, low=1, high=1000),
        **flags,
    }


def _add(added: dict[str, dict], ids: dict[int, str], entry: dict, where: str) -> None:
    token, id = entry["content"], entry["id"]
    known = added.setdefault(token, entry)
    if known["id"] != id:
        raise TokenizerError(
            f"{where}: one file gives token {one_line(token)} the id {known['id']}, another {id}; "
            f"tokenizer.json, tokenizer_config.json and added_tokens.json must come from the same "
            f"checkpoint"
        )
    if ids.setdefault(id, token) != token:
        raise TokenizerError(
            f"{where}: the added tokens {one_line(ids[id])} and {one_line(token)} both have the id "
            f"{id} in tokenizer.json, tokenizer_config.json or added_tokens.json; give each its "
            f"own id"
        )


def qwen2_layout(
    files: dict[str, bytes], config: Object, added: dict[str, dict], where: str
) -> dict:
    """Returns the tokenizer.json of Qwen2's vocab.json and merges.txt.

    It has NFC normalization, the split rule and byte-level BPE.
    """
    for name in ("vocab.json", "merges.txt"):
        if name not in files:
            raise TokenizerError(
                f"{where}: {name} is missing; vocab.json and merges.txt belong together"
            )
    family = config.get("tokenizer_class", str, "Qwen2Tokenizer")
    if family not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise TokenizerError(
            f"{where}: vocab.json and merges.txt of a {one_line(family)}, whose rule for splitting "
            f"text is not known here; add the tokenizer.json that transformers saves for it"
        )
    vocab = check_vocabulary(read_json(files, "vocab.json", where))
    merges = _merges(files["merges.txt"], where)
    _check_fit(vocab, merges, added, where)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def check_tokenizer_json(data: Object) -> None:
    """Checks the parts of tokenizer.json that are used here and not only by `tokenizers`."""
    model = data.object("model")
    if isinstance(model.get("vocab", (dict, list), {}), dict):
        check_vocabulary(model.object("vocab", {}))
    for index, rule in enumerate(model.get("merges", list, [])):
        if type(rule) is not str:
            place = f"{model.where}: merges[{index}]"
            for part in check(rule, list, place, low=2, high=2):
                check(part, str, place)
    pre_tokenizer = data.object("pre_tokenizer", {})
    pre_tokenizer.list_of("pretokenizers", dict, [])


def without_comments(merges: list) -> list:
    """Returns the rules of tokenizer.json or merges.txt that do not begin with #."""
    return [
        rule for rule in merges if not (rule if isinstance(rule, str) else rule[0]).startswith("#")
    ]


def check_vocabulary(vocab: Object) -> dict[str, int]:
    """Checks that all ids are valid and distinct; returns the ids by entry."""
    entries, ids = vocab.values, vocab.values.values()
    if not all(type(id) is int and 0 <= id <= _LARGEST_ID for id in ids):
        for entry, id in entries.items():
            check(id, int, f"{vocab.where}: {excerpt(entry)}", low=0, high=_LARGEST_ID)
    if len(set(ids)) < len(entries):
        by_id = {}
        for entry, id in entries.items():
            if by_id.setdefault(id, entry) != entry:
                raise TokenizerError(
                    f"{vocab.where}: {excerpt(by_id[id])} and {excerpt(entry)} both have the id "
                    f"{id}; the file is damaged"
                )
    return entries


def _merges(content: bytes, where: str) -> list[str]:
    """Returns the lines of merges.txt, each two entries and a space, without a version line."""
    try:
        lines = decode(content, f"{where}/merges.txt").split("\n")
    except JsonError as error:
        raise TokenizerError(f"{error}; the file is damaged") from error
    if lines[0].startswith("#version:"):
        lines = lines[1:]
    return [line.strip() for line in lines if line.strip()]


def _check_fit(
    vocab: dict[str, int], merges: list[str], added: dict[str, dict], where: str
) -> None:
    """Raises TokenizerError unless the merges join entries to all entries of several symbols."""
    merged = {line.replace(" ", "") for line in merges}
    for line in merges:
        if line.count(" ") != 1 or not {*line.split(" "), line.replace(" ", "")} <= vocab.keys():
            raise TokenizerError(
                f"{where}: line {excerpt(line)} of merges.txt names or makes no entry of "
                f"vocab.json; {_MISFIT}"
            )
    orphans = [
        entry for entry in vocab if len(entry) > 1 and entry not in merged and entry not in added
    ]
    if orphans:
        raise TokenizerError(
            f"{where}: {len(orphans):,} entries of vocab.json, such as {excerpt(orphans[0])}, have "
            f"no line in merges.txt; {_MISFIT}"
        )
