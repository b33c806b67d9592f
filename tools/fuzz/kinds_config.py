"""Damaged config.json and similar files of released models."""

import json
import random
from collections.abc import Iterator

from tools.fuzz.case import Case, Kind
from tools.fuzz.kinds_models import CONVERT, cases_of, corpus
from tools.fuzz.mutate import edit_json, json_changes, set_json, value_changes

CONFIG = {
    name: allowed
    for allowed, names in (
        (
            frozenset(),
            "vision_config llm_config vision_config.hidden_size vision_config.num_attention_heads vision_config.num_hidden_layers "
            "vision_config.intermediate_size vision_config.image_size vision_config.patch_size vision_config.layer_norm_eps "
            "vision_config.norm_type vision_config.qk_normalization vision_config.qkv_bias llm_config.hidden_size "
            "llm_config.num_attention_heads llm_config.num_key_value_heads llm_config.num_hidden_layers llm_config.intermediate_size "
            "llm_config.vocab_size llm_config.rms_norm_eps llm_config.rope_theta llm_config.max_position_embeddings "
            "llm_config.hidden_act downsample_ratio force_image_size max_dynamic_patch min_dynamic_patch use_thumbnail ps_version template",
        ),
        # Null or an empty object means none here.
        (frozenset({"true"}), "select_layer system_message"),
    )
    for name in names.split()
}


def config_cases(rng: random.Random) -> Iterator[Case]:
    kind, file = "config", "released/config.json"
    document = json.loads((corpus() / file).read_text())
    loose = {"NaN", "1e999", "object", "list of null", "own text"}
    yield from cases_of(
        kind, _without_nesting(value_changes(file, document, CONFIG, loose)), "config.json"
    )
    yield from cases_of(kind, json_changes(file, rng), "config.json", "config")
    for name, changes in {
        "heads that do not divide": {"vision_config": {"num_attention_heads": 5}},
        "kv heads that do not divide": {"llm_config": {"num_key_value_heads": 3}},
        "patches that do not divide": {"vision_config": {"patch_size": 5}},
        "one layer more": {"llm_config": {"num_hidden_layers": 3}},
        "a billion layers": {"llm_config": {"num_hidden_layers": 10**9}},
        "a wider decoder": {"llm_config": {"hidden_size": 64}},
        "a huge vocabulary": {"llm_config": {"vocab_size": 10**12}},
        "another activation": {"llm_config": {"hidden_act": "gelu"}},
        "quantized": {"llm_config": {"quantization_config": {"quant_method": "awq"}}},
        "unmerged adapters": {"use_llm_lora": 16},
        "another model": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
        },
        "bounds crossed": {"min_dynamic_patch": 9, "max_dynamic_patch": 4},
        "an endless number of tiles": {"max_dynamic_patch": 10**9},
        "an unknown template": {"template": "internvl9"},
        "scaling of another kind": {
            "llm_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}
        },
        "scaling by NaN": {
            "llm_config": {"rope_scaling": {"type": "dynamic", "factor": float("nan")}}
        },
        "scaling by -2": {"llm_config": {"rope_scaling": {"type": "dynamic", "factor": -2}}},
        "scaling by a text": {"llm_config": {"rope_scaling": {"type": "dynamic", "factor": "2"}}},
        "scaling a text": {"llm_config": {"rope_scaling": "dynamic"}},
        "an unknown key": {"llm_config": {"num_experts": 8}},
    }.items():
        spoil = edit_json(file, lambda values, changes=changes: _merge(values, changes))
        named = {
            word
            for part in changes.items()
            for word in (part[0], *(part[1] if isinstance(part[1], dict) else ()))
        }
        yield Case(kind, name, "refuse", spoil, (*sorted(named), "config.json", "layers", "embed"))


def _merge(values: dict, changes: dict) -> None:
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name].update(value)
        else:
            values[name] = value


def _without_nesting(changes):
    """Drops the changes inside a list of architectures or of zeros."""
    return (change for change in changes if ".0 " not in change[0])


def small_cases(rng: random.Random) -> Iterator[Case]:
    kind, file = "preprocessor", "released/preprocessor_config.json"
    document = json.loads((corpus() / file).read_text())
    strict = {"image_mean": frozenset(), "image_std": frozenset()}
    changes = list(
        value_changes(
            file, document, strict, {"NaN", "1e999", "text", "object", "list", "true", "negative"}
        )
    )
    yield from cases_of(kind, changes, "preprocessor_config.json")
    yield from cases_of(kind, json_changes(file, rng, optional=True), "preprocessor_config")
    wrong = {
        "image_mean": (
            "[0.5, 0.5]",
            "[NaN, 0, 0]",
            '["a", "b", "c"]',
            "[[1], [2], [3]]",
            "[0.5, 0.5, 0.5, 0.5]",
            "[1e999, 0, 0]",
        )
    }
    wrong["image_std"] = (
        "[0, 0, 0]",
        "[-1, -1, -1]",
        "[0.5, 0.5]",
        "[NaN, 1, 1]",
        '["a", "b", "c"]',
        "[true, true, true]",
    )
    for key, texts in wrong.items():
        for text in texts:
            yield Case(kind, f"{key} = {text}", "refuse", set_json(file, (key,), text), (key,))
    file = "released/generation_config.json"
    yield from cases_of(kind, json_changes(file, rng, 3, optional=True), "generation_config")
    for text in ('"x"', "{}", "[null]", "-1", "[450.5]", "1e999", "NaN", "true", "[[450]]"):
        expected = "refuse" if text in ("1e999", "NaN") else "either"
        yield Case(
            kind,
            f"eos_token_id = {text}",
            expected,
            set_json(file, ("eos_token_id",), text),
            ("eos_token_id", "generation_config"),
        )


KINDS = [
    Kind("config", ("released",), cases=config_cases, **CONVERT),
    Kind("preprocessor", ("released",), cases=small_cases, **CONVERT),
]
