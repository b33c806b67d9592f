"""Reads the files that describe a checkpoint's tokenizer; tokenizer.py makes a tokenizer of them."""

import json

ALWAYS_CONTROL = frozenset(("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"))
ALWAYS_MARKUP = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
# All files that describe a tokenizer, whether this module reads them or only lets them travel with a checkpoint.
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
QWEN2_SPLIT = (  # the one part of Qwen2's tokenizer that its vocab.json and merges.txt do not hold
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MISFIT = "one of the two files is cut short or from another tokenizer"


class TokenizerError(ValueError):
    """Tokenizer files that are missing, damaged, contradictory or of an unknown kind, or a token or text they do not cover."""


def read_json(files: dict[str, bytes], name: str, where: str) -> dict:
    """Contents of a JSON file, {} if it is not there."""
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise TokenizerError(f"{where}/{name} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{where}/{name} is damaged: expected a JSON object")
    return values


def added_tokens(data: dict, config: dict, added_ids: dict, where: str) -> dict[str, dict]:
    """All added tokens as tokenizer.json writes them, by content; "special" is true of control tokens and of no other.

    data, config and added_ids are the contents of tokenizer.json, tokenizer_config.json and added_tokens.json. A token is
    special if any file says so, or if none says whether it is.
    """
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added, special = {}, set(ALWAYS_CONTROL)
    decoder = config.get("added_tokens_decoder", {})
    for entry in [*data.get("added_tokens", []), *({**entry, "id": int(id)} for id, entry in decoder.items())]:
        _add(added, {**defaults, **entry}, where)
        if entry.get("special", True):
            special.add(entry["content"])
    for token, id in added_ids.items():
        if token not in added:
            special.add(token)
        _add(added, {**defaults, "content": token, "id": id}, where)
    for token, entry in added.items():
        entry["special"] = token in special - ALWAYS_MARKUP
    return added


def _add(added: dict[str, dict], entry: dict, where: str) -> None:
    known = added.setdefault(entry["content"], entry)
    if known["id"] != entry["id"]:
        raise TokenizerError(
            f"{where}: one file gives token {entry['content']} the id {known['id']}, another {entry['id']}; tokenizer.json, "
            f"tokenizer_config.json and added_tokens.json must come from the same checkpoint"
        )


def qwen2_layout(files: dict[str, bytes], config: dict, added: dict[str, dict], where: str) -> dict:
    """tokenizer.json's contents for Qwen2's vocab.json and merges.txt: NFC, the split rule, byte-level BPE."""
    for name in ("vocab.json", "merges.txt"):
        if name not in files:
            raise TokenizerError(f"{where}: {name} is missing; vocab.json and merges.txt belong together")
    family = config.get("tokenizer_class", "Qwen2Tokenizer")
    if family not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise TokenizerError(
            f"{where}: vocab.json and merges.txt of a {family}, whose rule for splitting text is not known here; add the "
            f"tokenizer.json that transformers saves for it"
        )
    vocab, merges = read_json(files, "vocab.json", where), _merges(files["merges.txt"], where)
    _check_fit(vocab, merges, added, where)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }


def _merges(content: bytes, where: str) -> list[str]:
    """Lines of merges.txt, each two entries and a space, without the version line that may come first."""
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where}/merges.txt is damaged: {error}") from error
    if lines[0].startswith("#version:"):
        lines = lines[1:]
    return [line.strip() for line in lines if line.strip()]


def _check_fit(vocab: dict[str, int], merges: list[str], added: dict[str, dict], where: str) -> None:
    """Raises TokenizerError unless the merges make, from entries, just the entries of more than one symbol."""
    made = {line.replace(" ", "") for line in merges}
    for line in merges:
        if not {*line.split(" "), line.replace(" ", "")} <= vocab.keys():
            raise TokenizerError(f"{where}: line {line!r} of merges.txt names or makes no entry of vocab.json; {_MISFIT}")
    orphans = [entry for entry in vocab if len(entry) > 1 and entry not in made and entry not in added]
    if orphans:
        raise TokenizerError(
            f"{where}: {len(orphans):,} entries of vocab.json, such as {orphans[0]!r}, have no line in merges.txt; {_MISFIT}"
        )
