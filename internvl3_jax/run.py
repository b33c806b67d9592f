"""A training run's life in its directory: where it goes on, when it is saved, why it stops.

WORKDIR/config.json        the resolved configuration; a run with another one is not continued
WORKDIR/checkpoints/STEP   parameters, optimizer, data streams; see checkpoint.py
WORKDIR/log.jsonl          a row every `log_every` steps; see meter.py
WORKDIR/skipped.txt        reasons of samples that were left out
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax import checkpoint, distributed, preference, sharding
from internvl3_jax.components import frozen_hash
from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.data.batches import Prepared
from internvl3_jax.find import latest_step
from internvl3_jax.optimizer import Optimizer
from internvl3_jax.placement import Placement, total
from internvl3_jax.start import Past, base_of, beside_base, check_adapters_learn, check_frozen, differing, kept, warm_start
from internvl3_jax.train_step import TrainState, init_state, shardings_of, trained_paths

_ATTENTION = ("attention_vision", "attention_language")
_MEMORY = ("mesh", "micro_batches", "remat_vision", "remat_language", "offload_optimizer", "loss_chunk")
_LOGGING = ("log_every", "agree_every", "tensorboard", "wandb", "profile_steps")
FREE_TO_CHANGE = (*_MEMORY, "scan_unroll", *_ATTENTION, *_LOGGING)  # of TrainConfig, when a run goes on

log = logging.getLogger(__name__)


def save_config(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Prints the resolved configuration and keeps it with the run. ValueError if the run there has another one."""
    if jax.process_index():
        return  # that the processes agree is checked elsewhere; here they would read what the first one is writing
    text = json.dumps(to_dict(config), indent=1)
    path = workdir / "config.json"
    theirs = _completed(TrainConfig, json.loads(path.read_text())) if path.exists() else None
    if theirs and (found := differing(_deciding(theirs), _deciding(json.loads(text)), "")):
        raise ValueError(
            f"{workdir} is a run with another configuration ({path}): {'; '.join(found)}. Name another --workdir, or delete it"
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
    if config.get("lora", {}).get("rank"):
        free.add("init_from")  # the base may have moved; that it is the same is seen by its hash
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
    check_adapters_learn(config, shapes.params)
    places = shardings_of(shapes, mesh, config.offload_optimizer)
    if step is None:
        past = Past()
        if config.init_from:
            state = warm_start(config, optimizer, places, past)
        else:
            state = jax.jit(init, out_shardings=places)()
        past.frozen = frozen_hash(state.params, config.optimizer.freeze)
        return state, past
    wanted = sharding.abstract(shapes, places)
    stored = kept(config, wanted.params)
    params, opt_state, extra = checkpoint.restore_training(workdir, step, stored, wanted.opt_state)
    past = Past(**extra["past"])
    if config.lora.rank:
        params = beside_base(config, workdir, step, params, places, past)
    batches.restore(extra["data"])
    if jax.process_index() == 0:
        print(f"going on from step {step} of {workdir}")
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
