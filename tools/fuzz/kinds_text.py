"""Damaged tokenizers and adapters."""

import functools
import json
import random
from collections.abc import Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.kinds_models import CONVERT, cases_of, corpus
from tools.fuzz.mutate import (
    byte_changes,
    edit_bytes,
    edit_json,
    json_changes,
    place_changes,
    set_json,
    value_changes,
)
from tools.fuzz.safetensors_damage import edit_header, poison

FACTOR = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER = "peft/adapter_config.json"


def tokenizer_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to the four tokenizer files of released models."""
    kind, file = "tokenizer", "released/tokenizer_config.json"
    names = ("tokenizer_config.json", "added_tokens_decoder")
    yield from cases_of(kind, json_changes(file, rng, 3, optional=True), "tokenizer_config.json")
    for text in (
        "[]",
        '"x"',
        "5",
        "true",
        '{"x": {}}',
        '{"470": {"special": true}}',
        '{"470": "<x>"}',
        '{"470": null}',
        '{"-1": {"content": "<x>"}}',
    ):
        yield Case(
            kind,
            f"added_tokens_decoder = {text}",
            "refuse",
            set_json(file, ("added_tokens_decoder",), text),
            names,
        )
    for key, text in (
        ("content", "5"),
        ("content", "null"),
        ("content", '""'),
        ("special", '"no"'),
        ("lstrip", "[]"),
        ("normalized", "NaN"),
    ):
        expected = "either" if (key, text) == ("content", '""') else "refuse"
        yield Case(
            kind,
            f"453 {key} = {text}",
            expected,
            set_json(file, ("added_tokens_decoder", "453", key), text),
            (*names, "453"),
        )
    for key in ("tokenizer_class", "eos_token", "model_max_length", "add_bos_token"):
        for text in ("5", "[]", "{}", "NaN", "1e999"):
            expected = "refuse" if text in ("NaN", "1e999") else "either"
            yield Case(
                kind,
                f"{key} = {text}",
                expected,
                set_json(file, (key,), text),
                (key, "tokenizer_config.json"),
            )
    file = "released/vocab.json"
    yield from cases_of(kind, json_changes(file, rng, 4), "vocab.json")
    some = sorted(json.loads((corpus() / file).read_text()))[100]
    for text in (
        '"5"',
        "null",
        "[]",
        "{}",
        "-1",
        "1.5",
        "true",
        "NaN",
        "1e999",
        "1" * 400,
        "440",
        "100000000000",
    ):
        yield Case(
            kind,
            f"vocab {some!r} = {text[:20]}",
            "refuse",
            set_json(file, (some,), text),
            ("vocab.json",),
        )
    yield Case(
        kind,
        "vocab entry missing",
        "refuse",
        edit_json(file, lambda values: values.pop(some) and None),
        ("vocab.json", "merges.txt"),
    )
    file = "released/merges.txt"
    yield from (Case(kind, *change, ("merges.txt",)) for change in place_changes(file))
    for name, content in {
        "empty": b"",
        "binary": bytes(range(256)),
        "one word": b"#version: 0.2\nabc\n",
        "three words": b"#version: 0.2\na b c\n",
        "of nothing known": b"#version: 0.2\nqq zz\n",
        "UTF-16": "#version: 0.2\na b\n".encode("utf-16"),
    }.items():
        expected = "either" if name == "empty" else "refuse"
        yield Case(
            kind,
            f"merges {name}",
            expected,
            edit_bytes(file, lambda data, content=content: content),
            ("merges.txt", "vocab.json"),
        )
    yield Case(
        kind,
        "merges cut",
        "either",
        edit_bytes(file, lambda data: data[: len(data) // 2]),
        ("merges.txt",),
    )
    file = "released/added_tokens.json"
    names = ("added_tokens.json", "<img>", "tokenizer_config.json")
    yield from (
        Case(kind, name, "either" if "missing" in name else expected, spoil, names)
        for name, expected, spoil in json_changes(file, rng, 3)
    )
    for text in ('"x"', "null", "[]", "1.5", "-1", "true", "452", "5", "NaN"):
        yield Case(kind, f"<img> = {text}", "refuse", set_json(file, ("<img>",), text), names)


def single_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to tokenizer.json, the single file of newer releases."""
    kind, file = "tokenizer.json", "single/tokenizer.json"
    yield from cases_of(kind, json_changes(file, rng, 6), "tokenizer.json")
    for key in ("added_tokens", "model", "pre_tokenizer", "decoder", "normalizer"):
        for text in ('"x"', "[]", "5", "[1]", '{"type": "Nothing"}', "{}", "NaN", "true"):
            expected = (
                "either"
                if (key, text) in (("added_tokens", "[]"), ("normalizer", "{}"), ("decoder", "{}"))
                else "refuse"
            )
            yield Case(
                kind,
                f"{key} = {text}",
                expected,
                set_json(file, (key,), text),
                (key, "tokenizer.json"),
            )
    for key, texts in {
        "id": ('"x"', "null", "-1", "1.5", "true", "451"),
        "content": ("5", "null", "[]"),
        "special": ('"x"', "5"),
    }.items():
        for text in texts:
            spoil = set_json(file, ("added_tokens", 5, key), text)
            yield Case(
                kind,
                f"an added token's {key} = {text}",
                "refuse",
                spoil,
                ("added_tokens", "tokenizer.json", "<IMG_CONTEXT>"),
            )
    for key in ("id", "content"):
        spoil = edit_json(file, lambda values, key=key: values["added_tokens"][5].pop(key) and None)
        yield Case(
            kind,
            f"an added token without {key}",
            "refuse",
            spoil,
            ("added_tokens", "tokenizer.json"),
        )
    yield Case(
        kind,
        "added tokens are texts",
        "refuse",
        set_json(file, ("added_tokens",), '["<img>"]'),
        ("added_tokens", "tokenizer.json"),
    )
    for key, texts in {
        "vocab": ("[]", "null", '"x"', '{"a": "b"}', '{"a": -1}', '{"a": 1.5}', "{}"),
        "merges": ("5", '"x"', "[1]", '["a"]', '[["a"]]', "null"),
        "type": ("5", '"WordPiece"', '"Nothing"'),
    }.items():
        for text in texts:
            yield Case(
                kind,
                f"model.{key} = {text}",
                "refuse",
                set_json(file, ("model", key), text),
                (key, "model", "tokenizer.json"),
            )
    yield Case(
        kind,
        "a part of the splitting is null",
        "refuse",
        set_json(file, ("pre_tokenizer",), '{"type": "Sequence", "pretokenizers": [null]}'),
        ("pre_tokenizer", "tokenizer.json"),
    )


def adapter_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to a PEFT directory."""
    kind, file = "adapter", "adapter_model.safetensors"
    document = json.loads((corpus() / ADAPTER).read_text())
    strict = {
        "r": {"own list"},
        "lora_alpha": frozenset(),
        "use_rslora": frozenset(),
        "fan_in_fan_out": frozenset(),
        "bias": frozenset(),
    }
    strict |= {
        "target_modules": {"text", "of null", "of objects"},
        "rank_pattern": {"list"},
        "alpha_pattern": {"list"},
        "peft_type": frozenset(),
    }
    strict["r"] = frozenset()
    yield from cases_of(
        kind,
        value_changes(ADAPTER, document, strict, {"NaN", "1e999", "object", "text"}),
        "adapter_config.json",
    )
    yield from cases_of(kind, json_changes(ADAPTER, rng, 4), "adapter_config.json")
    for name, value in {
        "peft_type": "LOHA",
        "bias": "all",
        "use_dora": True,
        "fan_in_fan_out": True,
        "layer_replication": [[0, 2]],
        "megatron_config": {},
        "init_lora_weights": "pissa",
        "alora_invocation_tokens": [1],
        "lora_bias": True,
        "use_qalora": True,
        "corda_config": {"x": 1},
        "trainable_token_indices": [1],
        "target_parameters": ["x"],
        "modules_to_save": ["nothing"],
        "r": 8,
        "some_new_setting": 5,
        "lora_ga_config": {"a": 1},
        "arrow_config": {"a": 1},
        "use_bdlora": {"a": 1},
    }.items():
        # If an adapter's rank differs from that of its tensors, the tensors may decide, but none may
        # be dropped.
        expected = "either" if name in ("megatron_config", "modules_to_save") else "refuse"
        yield Case(
            kind,
            f"{name} is {value!r}",
            expected,
            edit_json(ADAPTER, lambda values, pair=(name, value): values.update([pair])),
            (name, file),
        )
    bomb = {"(a+)+$": 4.0, "(" * 40 + "a*" + ")*" * 40: 4.0, "[": 4.0, "x" * 100_000: 4.0}
    for number, pattern in enumerate(bomb):
        for key in ("alpha_pattern", "rank_pattern"):
            spoil = edit_json(
                ADAPTER, lambda values, key=key, pattern=pattern: values.update({key: {pattern: 4}})
            )
            yield Case(kind, f"{key} pattern {number}", "either", spoil, (key, "pattern"))
    weights = f"peft/{file}"
    for value in (float("nan"), float("inf")):
        for where in ("first", "all"):
            yield Case(
                kind,
                f"{value} {where}",
                "refuse",
                poison(value, FACTOR, where, weights),
                (FACTOR, "q_proj", file),
            )
    for name, change in {
        "a factor missing": lambda header: header.pop(FACTOR) and None,
        "an unknown module": lambda header: header.update(
            {FACTOR.replace("q_proj", "z_proj"): header.pop(FACTOR)}
        ),
        "a layer too many": lambda header: header.update(
            {FACTOR.replace("layers.0", "layers.9"): header.pop(FACTOR)}
        ),
        "another shape": lambda header: header[FACTOR].update(shape=[32, 4]),
        "another prefix": lambda header: header.update(
            {FACTOR.removeprefix("base_model.model."): header.pop(FACTOR)}
        ),
        "no tensors": lambda header: b"{}",
    }.items():
        yield Case(
            kind,
            name,
            "refuse",
            edit_header(change, weights),
            (file, "q_proj", "z_proj", "layers.9"),
        )
    yield from (
        Case(kind, *change, (file, "base_model"))
        for change in byte_changes(weights, rng, "refuse", 4, "either")
    )


single = functools.partial(programs.convert, source="single")
KINDS = [
    Kind("tokenizer", ("released",), cases=tokenizer_cases, **CONVERT),
    Kind("tokenizer.json", ("single",), cases=single_cases, **CONVERT | {"program": single}),
    Kind(
        "adapter",
        ("released", "peft"),
        cases=adapter_cases,
        **CONVERT | {"program": programs.load_adapter},
    ),
]
