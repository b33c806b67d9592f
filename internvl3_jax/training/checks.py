"""All that can be said against a run's configuration before anything is read, written or compiled."""

from collections.abc import Iterator

from internvl3_jax import config as settings
from internvl3_jax.config import ConfigError, TrainConfig
from internvl3_jax.io import limits
from internvl3_jax.model import lora
from internvl3_jax.model.ops.attention import IMPLEMENTATIONS
from internvl3_jax.model.ops.remat import POLICIES
from internvl3_jax.positions import parse_delta
from internvl3_jax.training import mpo
from internvl3_jax.training.optimizer import make_schedule

_LARGEST_BATCH = 1 << 40  # bytes, of all processes together


def validate(config: TrainConfig) -> None:
    """ConfigError with a line for each setting that is of a wrong type or out of its range, or else
    for each that contradicts another.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"the configuration is a {type(config).__name__}; get_config() must return a TrainConfig"
        )
    if found := limits.problems(config) or list(_together(config)):
        raise ConfigError("\n".join(found))


def _together(config: TrainConfig) -> Iterator[str]:
    """Of a configuration whose settings are possible by themselves."""
    data, processor = config.data, config.processor
    for check in (_model, _schedule, lora.freeze_base, lambda config: mpo.check(config.loss)):
        try:
            check(config)
        except ValueError as error:
            yield str(error)
    if data.rows % data.shards:
        yield f"data.rows is {data.rows}; it must be a multiple of data.shards ({data.shards})"
    if data.rows % config.micro_batches:
        yield f"micro_batches is {config.micro_batches}; data.rows ({data.rows}) must be a multiple of it"
    size = data.rows * (40 * data.tokens_per_row + 3 * data.tiles_per_row * processor.image_size**2)
    if size > _LARGEST_BATCH:
        yield f"data.rows, tokens_per_row and tiles_per_row make batches of {size / 2**30:,.0f} GiB; lower one of them"
    if data.min_frames > data.max_frames:
        yield f"data.min_frames is {data.min_frames}; it must be at most data.max_frames ({data.max_frames})"
    if processor.min_tiles > processor.max_tiles:
        yield f"processor.min_tiles is {processor.min_tiles}; it must be at most processor.max_tiles ({processor.max_tiles})"
    if (processor.image_size, processor.tokens_per_tile) != (
        config.model.vision.image_size,
        config.model.tokens_per_tile,
    ):
        yield (
            f"processor.image_size and tokens_per_tile are {processor.image_size} and {processor.tokens_per_tile}; the model's are "
            f"{config.model.vision.image_size} and {config.model.tokens_per_tile}"
        )
    for name, known in (("remat", POLICIES), ("attention", IMPLEMENTATIONS)):
        for part in ("vision", "language"):
            if (value := getattr(config, f"{name}_{part}")) not in known:
                yield f"{name}_{part} is {value!r}; it must be one of {', '.join(known)}"
    for delta in data.deltas:
        try:
            parse_delta(delta)
        except ValueError as error:
            yield f"data.deltas: {error}"
    if (
        len(open_axes := [f"mesh.{axis}" for axis, size in vars(config.mesh).items() if size == -1])
        > 1
    ):
        yield f"{' and '.join(open_axes)} are -1; only one axis can take the devices that the others leave"


def _model(config: TrainConfig) -> None:
    try:
        settings.validate(config.model)
    except ConfigError as error:
        raise ConfigError(str(error).replace("ModelConfig.", "model.")) from error


def _schedule(config: TrainConfig) -> None:
    make_schedule(config.optimizer, config.steps, config.optimizer.learning_rate)
