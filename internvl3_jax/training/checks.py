"""Checks of a run's configuration that read no file and touch no device."""

from collections.abc import Iterator

from internvl3_jax import config as settings
from internvl3_jax.config import ConfigError, TrainConfig
from internvl3_jax.io import limits
from internvl3_jax.model import lora
from internvl3_jax.model.ops.attention import IMPLEMENTATIONS
from internvl3_jax.model.ops.remat import POLICIES
from internvl3_jax.positions import parse_delta
from internvl3_jax.training import log_sinks, mpo
from internvl3_jax.training.optimizer import make_schedule

# Bytes of the largest batch, over all processes.
_LARGEST_BATCH = 1 << 40


def validate(config: TrainConfig) -> None:
    """Checks each setting by itself and, if all are possible, which of them contradict each other.

    Raises:
      ConfigError: With a line for each wrong setting.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"the configuration is a {type(config).__name__}; "
            f"get_config() must return a TrainConfig"
        )
    if problems := limits.problems(config) or list(_contradictions(config)):
        raise ConfigError("\n".join(problems))


def check_run(config: TrainConfig) -> None:
    """Raises ValueError or ImportError for a configuration that cannot be trained."""
    validate(config)
    log_sinks.check_extras(config)
    if not config.data.source:
        raise ValueError(
            "data.source is empty; name the meta JSON of your data: --config.data.source=meta.json"
        )


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """Yields a line for each contradiction between settings that are possible by themselves."""
    data, processor = config.data, config.processor
    for check in (
        _model,
        _schedule,
        lora.freeze_base,
        _flash,
        lambda config: mpo.check(config.loss),
    ):
        try:
            check(config)
        except ValueError as error:
            yield str(error)
    if config.loss.balance_weight and not config.model.language.num_experts:
        yield (
            f"loss.balance_weight is {config.loss.balance_weight}, but the decoder has no experts "
            f"to balance; set it to 0"
        )
    for name in ("every", "answers"):
        if (value := getattr(config.eval, name)) and not config.eval.source:
            yield (
                f"eval.{name} is {value}, but eval.source is empty; name the meta JSON of the "
                f"evaluation data: --config.eval.source=eval.json"
            )
    if data.rows % data.shards:
        yield f"data.rows is {data.rows}; it must be a multiple of data.shards ({data.shards})"
    if data.rows % config.micro_batches:
        yield (
            f"micro_batches is {config.micro_batches}; "
            f"data.rows ({data.rows}) must be a multiple of it"
        )
    size = data.rows * (40 * data.tokens_per_row + 3 * data.tiles_per_row * processor.image_size**2)
    if size > _LARGEST_BATCH:
        yield (
            f"data.rows, tokens_per_row and tiles_per_row make batches of {size / 2**30:,.0f} GiB; "
            f"lower one of them"
        )
    if data.min_frames > data.max_frames:
        yield (
            f"data.min_frames is {data.min_frames}; "
            f"it must be at most data.max_frames ({data.max_frames})"
        )
    if processor.min_tiles > processor.max_tiles:
        yield (
            f"processor.min_tiles is {processor.min_tiles}; "
            f"it must be at most processor.max_tiles ({processor.max_tiles})"
        )
    image_size, tokens_per_tile = config.model.vision.image_size, config.model.tokens_per_tile
    if (processor.image_size, processor.tokens_per_tile) != (image_size, tokens_per_tile):
        yield (
            f"processor.image_size and tokens_per_tile are {processor.image_size} and "
            f"{processor.tokens_per_tile}; the model's are {image_size} and {tokens_per_tile}"
        )
    for name, known in (("remat", POLICIES), ("attention", IMPLEMENTATIONS)):
        for tower in ("vision", "language"):
            if (value := getattr(config, f"{name}_{tower}")) not in known:
                yield f"{name}_{tower} is {value!r}; it must be one of {', '.join(known)}"
    for delta in data.deltas:
        try:
            parse_delta(delta)
        except ValueError as error:
            yield f"data.deltas: {error}"
    open_axes = [f"mesh.{axis}" for axis, size in vars(config.mesh).items() if size == -1]
    if len(open_axes) > 1:
        yield (
            f"{' and '.join(open_axes)} are -1; only one axis can take the devices that the others "
            f"leave"
        )


def _model(config: TrainConfig) -> None:
    try:
        settings.validate(config.model)
    except ConfigError as error:
        raise ConfigError(str(error).replace("ModelConfig.", "model.")) from error


def _flash(config: TrainConfig) -> None:
    """Raises ValueError if model, loss and the rest do not go together in a Flash model's stage."""
    kind = config.loss.kind
    if config.model.flash != (kind in ("vico", "router")):
        raise ValueError(
            f"model.flash is {config.model.flash} and loss.kind {kind!r}: a model with a router is "
            "trained with loss.kind 'vico' and then 'router', and no other model is"
        )
    if not config.model.flash:
        return
    wrong = {
        "lora.rank": config.lora.rank,
        "loss.balance_weight": config.loss.balance_weight,
        "eval.every": kind == "router" and config.eval.every,
    }
    for name, value in wrong.items():
        if value:
            raise ValueError(
                f"{name} is {value}, which loss.kind {kind!r} does not support; set it to 0"
            )
    if not config.data.tiles_per_row:
        raise ValueError(f"data.tiles_per_row is 0; loss.kind {kind!r} is about tiles")


def _schedule(config: TrainConfig) -> None:
    make_schedule(config.optimizer, config.steps, config.optimizer.learning_rate)
