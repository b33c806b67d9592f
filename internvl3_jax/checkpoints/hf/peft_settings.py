"""Reads adapter_config.json of PEFT strictly: a setting that is not plain LoRA is refused.

A setting may change the base's weights or the meaning of the tensors. So each key is listed here
with the values that are plain LoRA, and an unknown key is an error unless it is off.
"""

import functools
import math
import pathlib
import re
import time
from typing import NamedTuple

from internvl3_jax.checkpoints.hf.values import ConversionError
from internvl3_jax.io import limits
from internvl3_jax.io.checkpoint_paths import PEFT
from internvl3_jax.io.model_files import exists, read_file
from internvl3_jax.io.strict_json import Object, check, loads, suggestion
from internvl3_jax.io.terminal import excerpt, one_line

_ALPHA = dict(zip(("low", "high"), limits.LORA_ALPHA, strict=True))
WEIGHTS = "adapter_model.safetensors"
# Not used: they say how and on what the adapter was trained.
_INFORMATIVE = frozenset(
    """task_type auto_mapping peft_version revision inference_mode lora_dropout runtime_config
    megatron_core qalora_group_size eva_config layers_to_transform layers_pattern
    exclude_modules""".split()
)
# Keys that can change the adapter from x @ a @ b * scale, or the base, and their plain values.
_PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "ensure_weight_tying": (False,),
    "alora_invocation_tokens": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "megatron_config": ({},),
    "loftq_config": ({},),
    "corda_config": ({},),
    "lora_ga_config": ({},),
    "arrow_config": ({},),
    "kasa_config": ({},),
    "velora_config": ({},),
    "monteclora_config": ({},),
    "use_bdlora": (False, {}),
}
# Initializations. With others PEFT subtracts something from the base's weights.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "kaiming", "xavier")
_OFF = (None, False, [], {}, "")
# Allowed patterns: no quantified group, no backreference, no counted repetition, so that their
# matching time is bounded.
_HARMLESS = re.compile(
    r"(?:[\w.\-/]|\\[.dwDWsS\-]|\[\^?[\w.\-]+\]|\((?:\?:)?|\)(?![*+?{])|[|^$]"
    r"|(?<=[\w.\-\]])[*+?](?![*+?]))*"
)
_MOST_PATHS, _NAME = 2e7, 80  # of a matcher through one name; letters of a name
_LONGEST_PATTERN, _MOST_PATTERNS = 300, 1000
_SECONDS = 20  # for all patterns of an adapter together


class Settings(NamedTuple):
    """The settings of adapter_config.json that are used."""

    path: pathlib.Path
    base: str | None
    rank: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]  # by pattern, of modules with another rank
    alphas: dict[str, float]
    # Ends of names of modules with adapters; () if the file has a pattern or restricts them.
    targets: tuple[str, ...]
    whole: tuple[str, ...]  # ends of names of fully trained modules
    spent: list[float]  # one element: seconds spent on matching patterns

    def scale(self, module: str, rank: int) -> float:
        """Returns the factor of a module's a @ b; ConversionError if its rank is not `rank`."""
        expected = self._by_pattern(self.ranks, module, self.rank)
        if rank != expected:
            raise ConversionError(
                f"{self.path}: gives {one_line(module)} the rank {expected}, but its tensors have "
                f"the rank {rank}"
            )
        return self._by_pattern(self.alphas, module, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )

    def _by_pattern(self, patterns: dict[str, float], module: str, default: float) -> float:
        """Returns the value of the first pattern that matches as in PEFT: the name or its end."""
        for pattern, value in patterns.items():
            started = time.monotonic()
            match = _compiled(pattern).match(module)
            self.spent[0] += time.monotonic() - started
            if self.spent[0] > _SECONDS:
                raise ConversionError(
                    f"{self.path}: its patterns take more than {_SECONDS} s to match; write names "
                    "of modules"
                )
            if match:
                return value
        return default


def settings_of(directory: pathlib.Path) -> Settings:
    """Reads adapter_config.json and checks that it is plain LoRA and that the weights exist.

    Raises:
      ConversionError, FileError: a key is wrong, unknown or not supported; the message names it.
    """
    path = directory / PEFT
    where = one_line(str(path))
    fields = Object(loads(read_file(path), where), where)
    for name, plain in _PLAIN.items():
        fields.asked.add(name)
        value = fields.values.get(name)
        if value is not None and not any(
            value == supported and type(value) is type(supported) for supported in plain
        ):
            raise ConversionError(f"{where}: {name} is {excerpt(value)}; supported: {plain[0]!r}")
    _check_start(fields, where)
    restricted = any(
        fields.values.get(name) not in _OFF
        for name in ("layers_to_transform", "layers_pattern", "exclude_modules")
    )
    targets = _names(fields, "target_modules", (str, list))
    settings = Settings(
        path,
        fields.get("base_model_name_or_path", str, None, high=4096),
        fields.get("r", int, low=1, high=1 << 16),
        fields.get("lora_alpha", float, **_ALPHA),
        fields.get("use_rslora", bool, False),
        _patterns(fields, "rank_pattern", int, low=1, high=1 << 16),
        _patterns(fields, "alpha_pattern", float, **_ALPHA),
        () if restricted or isinstance(targets, str) else tuple(targets),
        tuple(_names(fields, "modules_to_save", (list,))),
        [0.0],
    )
    fields.get("lora_dropout", float, None, low=0, high=1)
    for name, value in fields.values.items():
        if name not in fields.asked | _INFORMATIVE and value not in _OFF:
            near = suggestion(name, fields.asked | _INFORMATIVE)
            raise ConversionError(
                f"{where}: {excerpt(name)} is {excerpt(value)}; this setting is not known here, "
                f"and may change what the adapter means{near}"
            )
    if not exists(directory / WEIGHTS):
        raise ConversionError(
            f"{directory} has no {WEIGHTS}; let PEFT save it with safe_serialization=True"
        )
    return settings


def _check_start(fields: Object, where: str) -> None:
    start = fields.get("init_lora_weights", (bool, str), None)
    start = start.lower() if isinstance(start, str) else start
    if start is not None and start not in _INITS:
        raise ConversionError(
            f"{where}: init_lora_weights is {excerpt(start)}, so it belongs to a base that PEFT "
            "changes; save it with path_initial_model_for_weight_conversion, which makes a plain "
            "one of it"
        )


def _names(fields: Object, name: str, kinds: tuple) -> str | list[str]:
    value = fields.get(name, kinds, [], high=_MOST_PATTERNS)
    return (
        value
        if isinstance(value, str)
        else fields.list_of(name, str, [], low=1, high=_LONGEST_PATTERN)
    )


def _patterns(fields: Object, name: str, kind: type, **bounds) -> dict[str, float]:
    patterns = fields.get(name, dict, {}, high=_MOST_PATTERNS)
    for pattern, value in patterns.items():
        check(value, kind, f"{fields.where}: {name}: {excerpt(pattern)}", **bounds)
        paths = float(_NAME) ** sum(map(pattern.count, "*+")) * 2.0 ** sum(map(pattern.count, "?|"))
        if (
            len(pattern) > _LONGEST_PATTERN
            or paths > _MOST_PATHS
            or not _HARMLESS.fullmatch(pattern)
        ):
            raise ConversionError(
                f"{fields.where}: {name}: {excerpt(pattern)} is a regular expression that could "
                "take forever; write names of modules, or a short pattern without repeated groups"
            )
        _compiled(pattern)
    return patterns


@functools.lru_cache(maxsize=_MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ConversionError(
            f"{PEFT}: {excerpt(pattern)} is not a regular expression ({error})"
        ) from error


def ends_with(module: str, end: str) -> bool:
    """Returns whether a module is a target: `end` is its name, or its end after a dot."""
    return module == end or module.endswith(f".{end}")
