"""A training run's life in its directory: where it goes on, when it is saved, why it stops.

WORKDIR/config.json        the resolved configuration; a run with another one is not continued
WORKDIR/checkpoints/STEP   parameters, optimizer, data streams; see checkpoint.py
WORKDIR/log.jsonl          a row every `log_every` steps; see meter.py
WORKDIR/skipped.txt        reasons of samples that were left out
"""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax import checkpoint, distributed, lora, preference, sharding
from internvl3_jax.adapters import Adapter
from internvl3_jax.components import frozen_hash
from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.data.batches import Prepared
from internvl3_jax.find import latest_step
from internvl3_jax.manifest import Base
from internvl3_jax.model import abstract_params
from internvl3_jax.optimizer import Optimizer, split_params
from internvl3_jax.placement import Placement, total
from internvl3_jax.storage import by_path, nest
from internvl3_jax.train_step import TrainState, first_shift, init_state, shardings_of, trained_paths

_ATTENTION = ("attention_vision", "attention_language")
_MEMORY = ("mesh", "micro_batches", "remat_vision", "remat_language", "offload_optimizer", "loss_chunk")
_LOGGING = ("log_every", "agree_every", "tensorboard", "wandb", "profile_steps")
FREE_TO_CHANGE = (*_MEMORY, "scan_unroll", *_ATTENTION, *_LOGGING)  # of TrainConfig, when a run goes on

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Past:
    """What a run remembers beside its arrays and data streams."""

    seconds: float = 0.0  # trained so far
    best: float = float("inf")  # lowest held-out loss
    best_step: int = 0
    frozen: str = ""  # hash of what is not trained


def save_config(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Prints the resolved configuration and keeps it with the run. ValueError if the run there has another one."""
    if jax.process_index():
        return  # that the processes agree is checked elsewhere; here they would read what the first one is writing
    text = json.dumps(to_dict(config), indent=1)
    path = workdir / "config.json"
    theirs = _completed(TrainConfig, json.loads(path.read_text())) if path.exists() else None
    if theirs and (differing := _differing(_deciding(theirs), _deciding(json.loads(text)), "")):
        raise ValueError(
            f"{workdir} is a run with another configuration ({path}): {'; '.join(differing)}. Name another --workdir, or delete it"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


def _completed(cls, values: dict) -> dict:
    """A configuration that was saved before some of the fields were there: these have their defaults, which change nothing."""
    found = dict(values)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found[field.name] = _completed(field.type, values.get(field.name, {}))
        elif field.name not in values and field.default is not dataclasses.MISSING:
            found[field.name] = json.loads(json.dumps(field.default))  # as it would have been saved
    return found


def _deciding(config: dict) -> dict:
    """What decides about the numbers; the rest may change while a run stands still: other devices, another cut of the same update."""
    data = {name: value for name, value in config["data"].items() if name != "workers"}
    free = set(FREE_TO_CHANGE)
    if config.get("loss", {}).get("kind") == "mpo":
        free.discard("micro_batches")  # each adds to the rewards' mean before the next is computed
    return {name: value for name, value in config.items() if name not in free} | {"data": data}


def restore_or_init(
    config: TrainConfig, workdir: pathlib.Path, model, optimizer: Optimizer, batches, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Past]:
    """From the newest undamaged checkpoint, which also sets `batches` to where they were; else from `config.init_from`, or random.

    Each array is made or read where it belongs on the mesh, which may be another one than the checkpoint was saved from.
    """
    size = config.model.vision.image_size
    row = np.zeros((1, 1), np.int32)
    example = {"tokens": row, "positions": row, "segments": row, "tiles": np.zeros((1, 1, size, size, 3), np.uint8)}

    def init():
        return init_state(model, optimizer, example, config.seed, jnp.dtype(config.param_dtype), config.lora, config.loss)

    if config.lora.rank and not config.init_from:
        raise ValueError("lora.rank is above 0 and init_from is empty: name the base that the adapters are trained beside")
    step = agreed_step(workdir)
    shapes = jax.eval_shape(init)
    places = shardings_of(shapes, mesh, config.offload_optimizer)
    if step is None:
        state = warm_start(config, optimizer, places) if config.init_from else jax.jit(init, out_shardings=places)()
        return state, Past(frozen=frozen_hash(state.params, config.optimizer.freeze))
    wanted = sharding.abstract(shapes, places)
    stored = kept(config, wanted.params)
    params, opt_state, extra = checkpoint.restore_training(workdir, step, stored, wanted.opt_state)
    if config.lora.rank:
        params = nest(by_path(open_base(config, places).params) | by_path(params))
    batches.restore(extra["data"])
    if jax.process_index() == 0:
        print(f"going on from step {step} of {workdir}")
    past = Past(**extra["past"])
    check_frozen(config, params, past, step)
    shift = shapes.shift and preference.Shift(*(_everywhere(np.float32(value), mesh) for value in extra["shift"]))
    return TrainState(_everywhere(np.int32(step), mesh), params, opt_state, shift), past


def agreed_step(workdir: pathlib.Path) -> int | None:
    """The newest complete step. An error where the processes see different ones, as they do if WORKDIR is not shared."""
    step = latest_step(workdir)
    # Their data may have been indexed until now, on one host faster than on another.
    distributed.check_agreement(0, {"newest complete step": "none" if step is None else step}, seconds=1800)
    return step


def _everywhere(value, mesh):
    return jax.device_put(value, jax.NamedSharding(mesh, jax.P()))


def kept(config: TrainConfig, params: dict) -> dict:
    """What of the parameters a checkpoint holds: all, or of a LoRA run what it trains."""
    return split_params(params, config.optimizer.freeze)[0] if config.lora.rank else params


def warm_start(config: TrainConfig, optimizer: Optimizer, places: TrainState) -> TrainState:
    """The first state from a checkpoint, a released directory of either layout or a hub id; all of its parameters or an error."""
    source = open_base(config, places)
    params = source.params
    if config.lora.rank:
        draw = functools.partial(lora.init, abstract_params(config.model), config.lora)
        drawn = jax.jit(draw, out_shardings=places.params[lora.SUBTREE])(jax.random.key(config.seed))
        params = params | {lora.SUBTREE: drawn}
        if config.lora.init_from:
            params = continued(checkpoint.load_adapter(config.lora.init_from, source), params, config, places)
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
    shift = jax.device_put(first_shift(config.loss), places.shift)
    return TrainState(jax.device_put(np.int32(0), places.step), params, opt_state, shift)


def open_base(config: TrainConfig, places: TrainState) -> checkpoint.Checkpoint:
    """`config.init_from`; its parameters, without adapters, are as a run trains them or trains beside them."""
    prepare = functools.partial(lora.prepared_leaf, config=config.lora) if config.lora.rank else None
    source = checkpoint.load(config.init_from, dtype=config.param_dtype, mesh=places.step.mesh, prepare=prepare)
    theirs, ours = to_dict(source.config), to_dict(config.model)
    theirs["vision"]["drop_path"] = ours["vision"]["drop_path"]  # of the training, not of the weights
    if differing := _differing(theirs, ours, "model"):
        raise ValueError(f"{config.init_from} is another model than the configuration's: {'; '.join(differing)}")
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config.model)))
    if jax.process_index() == 0:
        print(f"all {count:,} parameters are from {source.directory}; none is missing, none is initialised")
    if config.lora.rank:
        source.params = jax.device_put(source.params, lora.without(places.params))
    return source


def continued(adapter: Adapter, params: dict, config: TrainConfig, places: TrainState) -> dict:
    """The parameters with an adapter in the place of the new ones. ValueError unless it has the layers and ranks of the configuration."""
    own = {lora.SUBTREE: lora.unscaled(adapter.lora, config.lora)} | adapter.whole
    theirs, ours = by_path(own), by_path(kept(config, params))
    wrong = [name for name in theirs | ours if np.shape(theirs.get(name)) != np.shape(ours.get(name))]
    if wrong:
        name = wrong[0]
        shapes = " and ".join(str(np.shape(leaves[name])) if name in leaves else "missing" for leaves in (theirs, ours))
        raise ValueError(f"{config.lora.init_from} does not fit lora.rank, targets and full: {name} is {shapes} there and here")
    placed = by_path(places.params)
    put = {name: jax.device_put(jnp.asarray(leaf, jnp.float32), placed[name]) for name, leaf in theirs.items()}
    return nest(by_path(params) | put)


def _differing(theirs: dict, ours: dict, where: str) -> list[str]:
    found = []
    for name in theirs | ours:
        value, own, path = theirs.get(name), ours.get(name), f"{where}.{name}" if where else name
        if isinstance(value, dict) and isinstance(own, dict):
            found += _differing(value, own, path)
        elif value != own:
            found.append(f"{path} is {value!r} there and {own!r} here")
    return found


class Saver:
    """Saves steps in the background, one at a time."""

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, placement: Placement, files: dict[str, bytes]):
        self.config, self.workdir, self.placement, self.files = config, workdir, placement, files
        self.finish: Callable[[], None] = lambda: None

    def start(self, step: int, state: TrainState, prepared: Prepared, past: Past) -> None:
        """Training may go on, and donate the state, when this returns."""
        self.wait()
        check_frozen(self.config, state.params, past, step)
        best = past.best_step if self.config.keep_best else 0

        def keep_also(step: int) -> bool:
            return step == best or bool(self.config.keep_every and step % self.config.keep_every == 0)

        self.finish = checkpoint.start_saving_training(
            self.workdir,
            step,
            kept(self.config, state.params),
            state.opt_state,
            model=self.config.model,
            processor=self.config.processor,
            files=self.files,
            extra={"past": dataclasses.asdict(past), "shift": [float(value) for value in state.shift]},
            base=base_of(self.config, past),
            data={shard: prepared.states[shard] for shard in map(str, self.placement.saved)},
            keep=self.config.keep,
            keep_also=keep_also,
        )

    def wait(self) -> None:
        """Until what was started is complete."""
        self.finish()
        self.finish = lambda: None


def base_of(config: TrainConfig, past: Past) -> Base | None:
    """What a LoRA run's checkpoints say of their base."""
    if not config.lora.rank:
        return None
    local = pathlib.Path(config.init_from).expanduser()
    path = str(local.absolute()) if local.exists() else config.init_from  # or a hub id
    return Base(path, config.param_dtype, past.frozen, config.lora)


def check_frozen(config: TrainConfig, params, past: Past, step: int) -> None:
    """ValueError unless what is not trained has the bits that it began with."""
    if config.optimizer.freeze and frozen_hash(params, config.optimizer.freeze) != past.frozen:
        raise ValueError(f"step {step}: parameters that optimizer.freeze names have changed; the state is not saved")


class Guard:
    """Stops the run at a step whose numbers make no sense, naming the samples that it was computed from."""

    def __init__(self, params, optimizer: Optimizer, sources: list[str]):
        self.paths, self.sources, self.latest = trained_paths(params, optimizer), sources, None

    def add(self, step: int, metrics: dict, prepared: Prepared) -> None:
        """Looks at the step before this one, so that the device is never idle meanwhile."""
        self.check()
        self.latest = (step, metrics, prepared)

    def check(self) -> None:
        """Waits for the latest step. FloatingPointError at a loss or gradient that is not finite, or a trained leaf without gradient."""
        if self.latest is None:
            return
        (step, metrics, prepared), self.latest = self.latest, None
        if not bool(metrics["finite"]):
            values = ", ".join(f"{name} {float(metrics[name])}" for name in ("loss", "grad_norm"))
            raise FloatingPointError(f"{values} at step {step}{self._samples(prepared)}")
        index = int(metrics["zero_gradient"])
        if index >= 0 and (self.paths[index].removeprefix("lora/").startswith("language") or prepared.batch["tiles"].any()):
            raise FloatingPointError(f"the gradient of {self.paths[index]} is all zero at step {step}{self._samples(prepared)}")

    def _samples(self, prepared: Prepared) -> str:
        rows = [", ".join(f"{self.sources[source]} row {row}" for source, row in origin) for origin in prepared.origins]
        return "; the last checkpoint is kept. Samples: " + " | ".join(rows)


class Skipped:
    """Writes down each new reason for which a sample was left out."""

    def __init__(self, workdir: pathlib.Path):
        process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        self.path, self.known = workdir / f"skipped{process}.txt", set()

    def note(self, prepared: Prepared) -> int:
        """Samples that all processes have left out since the run began; they wait for each other."""
        new = [reason for reason in prepared.skipped if reason not in self.known]
        if new:
            self.known.update(new)
            with self.path.open("a") as file:
                file.writelines(f"{reason}\n" for reason in new)
            log.warning("left out: %s", "; ".join(new))
        return int(total(np.array([prepared.skipped_count], np.int64))[0])
