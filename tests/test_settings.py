"""What a run may be configured with: types, ranges and contradictions, and --config on a command
line.
"""

import dataclasses
import os
import re

import pytest
from absl import flags

from configs.common import RELEASED
from internvl3_jax import config as config_module
from internvl3_jax.config import (
    ConfigError,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from internvl3_jax.io import limits, typed
from internvl3_jax.io.command_line import UsageError
from internvl3_jax.training import checks, settings
from tests.support.tiny_checkpoint import CONFIG, train_config

pytestmark = pytest.mark.smoke


# --- types and ranges ----------------------------------------------------------------------------


def put(config, path: str, value):
    """The configuration, changed in place as a command line does it."""
    *groups, last = path.split(".")
    inner = config
    for name in groups:
        inner = getattr(inner, name)
    setattr(inner, last, value)
    return config


def base() -> TrainConfig:
    return from_dict(TrainConfig, to_dict(train_config()))


def test_the_table_names_fields_that_exist():
    for name, rules in limits.LIMITS.items():
        known = {field.name for field in dataclasses.fields(getattr(config_module, name))}
        assert rules.keys() <= known, name


WRONG = {
    "data.rows": 0,
    "data.shards": 0,
    "data.tokens_per_row": -1,
    "data.workers": -1,
    "data.deltas": (),
    "data.loss_reduction": "mean",
    "data.seed": -1,
    "micro_batches": 0,
    "checkpoint.every": 0,
    "logging.every": 0,
    "host_check_every": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": -1,
    "steps": 0,
    "seed": 2**40,
    "param_dtype": "x",
    "compute_dtype": "float",
    "loss_chunk": 0,
    "scan_unroll": 0,
    "logging.profile_steps": (3, 2),
    "attention_vision": "warp",
    "remat_language": "half",
    "model.vision.num_heads": 0,
    "model.vision.norm_eps": "1e-6",
    "model.vision.drop_path": 1.0,
    "model.vision.std": (0.2, 0.2),
    "model.language.num_kv_heads": 3,
    "model.language.vocab_size": 10**12,
    "model.language.rope_theta": float("nan"),
    "model.language.qkv_bias": 1,
    "processor.max_tiles": -3,
    "processor.stop_tokens": "<|im_end|>",
    "optimizer.learning_rate": -1.0,
    "optimizer.beta1": 2.0,
    "optimizer.clip_norm": -1.0,
    "optimizer.weight_decay": -1.0,
    "optimizer.warmup_steps": 30,
    "optimizer.warmup_fraction": 1.5,
    "optimizer.freeze": ("vision/.*", 3),
    "loss.beta": float("inf"),
    "loss.kind": "dpo",
    "lora.rank": -1,
    "lora.dropout": True,
    "mesh.fsdp": 0,
}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_setting_is_named(path):
    with pytest.raises(ConfigError) as raised:
        checks.validate(put(base(), path, WRONG[path]))
    (line,) = str(raised.value).splitlines()
    assert path in line and len(line) < 300, line


def float_fields(config, prefix: str = "model."):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from float_fields(value, f"{prefix}{field.name}.")
        elif isinstance(value, float) or "float" in str(field.type):
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize("path, value", list(float_fields(CONFIG)))
@pytest.mark.parametrize("wrong", [1e300, -1e300, 1e-300])
def test_a_number_of_a_model_has_a_range(path, value, wrong):
    """1e-300 is as good as 0, which rates and shares may be."""
    config = put(base(), path, (wrong,) * 3 if isinstance(value, tuple) else wrong)
    may_be_zero = ("layer_scale_init", "drop_path", "mean", "flash_relative", "flash_absolute")
    if wrong == 1e-300 and path.endswith(may_be_zero):
        checks.validate(config)
        return
    with pytest.raises(ConfigError, match=rf"{re.escape(path)} is .*; it must be .*from .* to "):
        checks.validate(config)


def test_all_wrong_settings_are_named_at_once():
    config = put(put(base(), "data.rows", 0), "optimizer.beta2", -0.1)
    expected = "data.rows is 0; it must be from 1 to 1,048,576\noptimizer.beta2 is -0.1; it must be at least 0.0 and below 1.0"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        checks.validate(config)


@pytest.mark.parametrize("changes, message", [
    ({"eval.every": 5}, "eval.every is 5, but eval.source is empty; name the meta JSON"),
    ({"eval.answers": 1}, "eval.answers is 1, but eval.source is empty"),
    ({"data.shards": 3}, r"data.rows is 2; it must be a multiple of data.shards \(3\)"),
    ({"micro_batches": 4}, r"micro_batches is 4; data.rows \(2\) must be a multiple of it"),
    ({"data.min_frames": 40}, "data.min_frames is 40; it must be at most data.max_frames"),
    ({"processor.tokens_per_tile": 8}, "processor.image_size and tokens_per_tile are 16 and 8; the model's are 16 and 4"),
    ({"data.deltas": ("1", "1/3")}, "data.deltas: delta '1/3' is not a multiple"),
    ({"optimizer.schedule": "wsd", "optimizer.decay_fraction": 1.0}, "optimizer.decay_fraction is 1.0: 30 of 30 steps"),
    ({"mesh.data": -1}, "mesh.data and mesh.fsdp are -1"),
    ({"data.rows": 2**20, "data.tiles_per_row": 2**20}, "data.rows, tokens_per_row and tiles_per_row make batches of [0-9,]+ GiB"),
])  # fmt: skip
def test_contradictions_are_named(changes, message):
    config = base()
    for path, value in changes.items():
        put(config, path, value)
    with pytest.raises(ConfigError, match=message):
        checks.validate(config)


def test_what_is_shipped_passes():
    from configs import finetune, lora, miniature, mpo, pretrain, sft, tiny_digits

    for name in RELEASED:
        for recipe in (finetune, mpo, pretrain, sft):
            checks.validate(recipe.get_config(name))
        config = lora.get_config(name)
        checks.validate(dataclasses.replace(config, init_from="somewhere"))
    for config in (tiny_digits.get_config(), miniature.get_config("sft"), train_config()):
        checks.validate(config)


@pytest.mark.parametrize("values, message", [
    ([], "here: is the list [.*expected an object"),
    ({"rank": "8"}, "here.rank is the text '8'; expected a whole number"),
    ({"rank": True}, "here.rank is the truth value True"),
    ({"alpha": [1]}, "here.alpha is the list"),
    ({"alpha": float("inf")}, "here.alpha is inf; expected a finite number"),
    ({"targets": "q"}, "here.targets is the text 'q'; expected a list"),
    ({"targets": ["q", 1]}, r"here.targets\[1\] is the number 1; expected a text"),
    ({"rank": 10**30}, "here.rank is a number of more than 63 bits"),
    ({"rnak": 8}, "here: unknown field 'rnak'; did you mean 'rank'"),
])  # fmt: skip
def test_a_dict_of_wrong_types_is_refused(values, message):
    with pytest.raises(ConfigError, match=message.replace("[.*", r"\[.*")):
        from_dict(LoraConfig, values, "here")


def test_a_dict_comes_back_as_it_was():
    assert from_dict(ModelConfig, to_dict(CONFIG)) == CONFIG
    assert from_dict(LoraConfig, {"alpha": 8, "targets": ["a"]}) == LoraConfig(
        alpha=8.0, targets=("a",)
    )
    with pytest.raises(ConfigError, match="ModelConfig: field 'vision' is missing"):
        from_dict(ModelConfig, {})
    damaged = to_dict(CONFIG)
    damaged["language"]["num_kv_heads"] = 0
    with pytest.raises(
        ConfigError, match="here: ModelConfig.language.num_kv_heads is 0; it must be from 1"
    ):
        from_dict(ModelConfig, damaged, "here")
    assert typed.typed(None, str | None, "here") is None


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path):
    """settings.load of a command line after --config; the recipe is the tiny model's."""
    path = tmp_path / "recipe.py"
    path.write_text(
        "import dataclasses\nfrom tests.support.tiny_checkpoint import train_config\n\n"
        "def get_config(steps='30'):\n    return dataclasses.replace(train_config(), steps=int(steps))\n"
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def load(*arguments, file=path):
        left = [*arguments]
        settings.take_overrides(left)
        assert left == []
        flags.FLAGS.config = None if file is None else str(file)
        return settings.load()

    yield load
    flags.FLAGS.config = None
    settings.take_overrides([])


def test_values_are_read_by_their_fields_types(load):
    chosen = load(
        "--config.steps=12",
        "--config.optimizer.learning_rate",
        "1e-4",
        "--config.data.source=meta.json",
        "--noconfig.checkpoint.keep_best",
        "--config.logging.tensorboard",
        "--config.optimizer.freeze=('vision/.*', 'projector/.*')",
        "--config.logging.profile_steps=2,3",
        "--config.data.deltas=1",
        "--config.data.deltas=1/2",
        "--config.processor.system_message=None",
    )
    config = chosen.config
    assert (config.steps, config.optimizer.learning_rate, config.data.source) == (
        12,
        1e-4,
        "meta.json",
    )
    assert (
        config.checkpoint.keep_best,
        config.logging.tensorboard,
        config.logging.profile_steps,
    ) == (False, True, (2, 3))
    assert config.optimizer.freeze == ("vision/.*", "projector/.*") and config.data.deltas == (
        "1",
        "1/2",
    )
    assert config.processor.system_message is None
    assert chosen.overrides["steps"] == (30, 12)
    assert "  steps = 12 (recipe: 30)\n" in chosen.overview(config)
    chosen.overrides["seed"] = (0, 0)  # as in the recipe
    assert "seed" not in chosen.overview(config)


@pytest.mark.parametrize("argument, message", [
    ("--config.data.rowz=3", "--config.data.rowz: there is no such setting; did you mean 'data.rows'?"),
    ("--config.data.on_error=skip", "there is no such setting; data has source, .*overlong"),
    ("--config.optimizer.lr=1", "there is no such setting; optimizer has name, learning_rate"),
    ("--config.evaluate_every=3", "there is no such setting; did you mean 'eval.every'?"),
    ("--config.log_every=3", "did you mean 'logging.every'?"),
    ("--config.keep_best=3", "did you mean 'checkpoint.keep_best'?"),
    ("--config.data.packing=x", "did you mean 'data.packing_buffer'?"),
    ("--config.eval.how_often=3", "there is no such setting; eval has source, every, batches, answers"),
    ("--config.learning_rate=3", "--config.learning_rate: .*; did you mean 'optimizer.learning_rate'?"),
    ("--config.data.rows=many", "--config.data.rows is 'many'; it must be a whole number"),
    ("--config.data.rows=1.5", "--config.data.rows is '1.5'; it must be a whole number"),
    ("--config.optimizer.learning_rate=nan", "--config.optimizer.learning_rate is nan; expected a finite number"),
    ("--config.logging.tensorboard=perhaps", "--config.logging.tensorboard is 'perhaps'; it must be true or false"),
    ("--config.logging.profile_steps=a,b", "--config.logging.profile_steps"),
    ("--config.data.rows", "--config.data.rows has no value; write --config.data.rows=VALUE"),
    ("--config.data=x", "--config.data is a group of settings; set one of them"),
    ("--noconfig.steps", "--noconfig.steps: only settings that are true or false"),
    ("--config.=3", "--config.: there is no such setting"),
    ("--config.data.rows.x=3", "--config.data.rows.x: there is no such setting"),
])  # fmt: skip
def test_a_wrong_argument_is_one_line(load, argument, message):
    with pytest.raises(UsageError, match=message) as raised:
        load(argument)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text, message", [
    ("def get_config(:\n", "bad.py line 1: SyntaxError: invalid syntax"),
    ("import nosuchmodule\n", "bad.py line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
    ("x = 1\n", "bad.py: AttributeError: module .* has no attribute 'get_config'"),
    ("def get_config():\n    return undefined\n", "bad.py line 2: NameError: name 'undefined' is not defined"),
    ("def get_config():\n    raise ValueError('no such stage')\n", "bad.py line 2: no such stage"),
    ("def get_config():\n    return {}\n", "bad.py returned a dict; it must return a TrainConfig"),
    ("raise SystemExit(3)\n", "bad.py line 1: SystemExit: 3"),
])  # fmt: skip
def test_an_error_in_the_file_is_one_line(load, tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        load(file=path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(load, tmp_path):
    with pytest.raises(UsageError, match="--config is missing"):
        load(file=None)
    with pytest.raises(UsageError, match=r"recipy.py: no such file; did you mean 'recipe.py'\?"):
        load(file=tmp_path / "recipy.py")
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(UsageError, match=r"pipe.py: is not a regular file; name a file"):
        load(file=tmp_path / "pipe.py")
    with pytest.raises(UsageError, match=r"recipe.py line 5: invalid literal for int\(\)"):
        load(file=f"{tmp_path}/recipe.py:many")
    assert load(file=f"{tmp_path}/recipe.py:7").config.steps == 7


def test_warm_up_follows_the_steps(load, tmp_path):
    """A fraction of all steps; a number of steps on the command line takes its place."""
    path = tmp_path / "fraction.py"
    path.write_text(
        "import dataclasses\nfrom tests.support.tiny_checkpoint import train_config\n\ndef get_config():\n    config = train_config()\n"
        "    optimizer = dataclasses.replace(config.optimizer, warmup_fraction=0.1)\n"
        "    return dataclasses.replace(config, optimizer=optimizer)\n"
    )
    from internvl3_jax.training.optimizer import make_schedule, warmup_steps

    config = load("--config.steps=200", file=path).config
    assert warmup_steps(config.optimizer, config.steps) == 20
    rates = make_schedule(config.optimizer, config.steps, 1.0)
    assert (float(rates(10)), float(rates(20))) == (0.5, 1.0)
    config = load("--config.steps=200", "--config.optimizer.warmup_steps=7", file=path).config
    assert warmup_steps(config.optimizer, config.steps) == 7
