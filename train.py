"""Trains a model.

    python train.py --config configs/tiny_digits.py --workdir runs/tiny_digits
    python train.py --config configs/tiny_digits.py --workdir runs/other --config.optimizer.learning_rate=1e-3

Started again with the same --workdir it goes on from the last complete checkpoint.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from internvl3_jax import checkpoint, report
from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.data.pipeline import make_batches, make_tokenizer
from internvl3_jax.evaluate import evaluate
from internvl3_jax.model import InternVL
from internvl3_jax.optimizer import make_optimizer
from internvl3_jax.train_step import TrainState, init_state, train_step

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config() -> TrainConfig.", lock_config=False)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, log, report.", required=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
    save_config(config, workdir)
    tokenizer = make_tokenizer(config.data)
    batches = iter(make_batches(config.data, config.processor, tokenizer))
    model = InternVL(config.model, scan_unroll=config.scan_unroll)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state, seconds = restore_or_init(config, workdir, model, optimizer, batches)
    state = train(config, workdir, model, optimizer, state, batches, tokenizer, seconds)
    if config.evaluate_per_task:
        scores = evaluate(config, state.params, tokenizer)
        report.write(workdir, config, scores)
        print(report.table(scores))


def save_config(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Prints the resolved configuration and keeps it with the run; a run with another one is not continued."""
    text = json.dumps(to_dict(config), indent=1)
    path = workdir / "config.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{workdir} is a run with another configuration ({path}); name another --workdir, or delete it")
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


def restore_or_init(config: TrainConfig, workdir, model, optimizer, batches) -> tuple[TrainState, float]:
    """(state, seconds trained before). From the last complete checkpoint, which also sets `batches` to where they were."""
    size = config.model.vision.image_size
    row = np.zeros((1, 1), np.int32)
    example = {"tokens": row, "positions": row, "segments": row, "tiles": np.zeros((1, 1, size, size, 3), np.uint8)}
    init = functools.partial(init_state, model, optimizer, example, config.seed)
    step = checkpoint.latest_step(workdir)
    if step is None:
        return jax.jit(init)(), 0.0
    abstract = jax.eval_shape(init)
    params, opt_state, extra = checkpoint.restore_training(workdir, step, abstract.params, abstract.opt_state)
    batches.set_state(extra["batches"])
    print(f"going on from step {step} of {workdir}")
    return TrainState(jnp.asarray(step, jnp.int32), params, opt_state), extra["seconds"]


def train(config: TrainConfig, workdir, model, optimizer, state, batches, tokenizer, seconds: float) -> TrainState:
    """Runs the remaining steps; logs to log.jsonl and saves as the configuration says."""
    step_fn = jax.jit(functools.partial(train_step, model, optimizer), donate_argnums=0)
    key = jax.random.key(config.seed)
    log = report.Log(workdir, int(state.step))
    began, finish_saving = time.perf_counter() - seconds, None
    with _progress() as progress:
        task = progress.add_task("training", total=config.steps, completed=int(state.step), loss=float("nan"))
        for step in range(int(state.step) + 1, config.steps + 1):
            state, metrics = step_fn(state, next(batches), key)
            saves = step % config.save_every == 0 or step == config.steps
            if saves or step % config.log_every == 0:
                row = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(list(row.values())).all():
                    if finish_saving:
                        finish_saving()
                    values = " and ".join(f"{name} {value}" for name, value in row.items())
                    raise FloatingPointError(f"{values} at step {step}; the last checkpoint is kept")
                log.write(step, row | {"seconds": time.perf_counter() - began})
                progress.update(task, completed=step, loss=row["loss"])
                if not sys.stdout.isatty():
                    print(
                        f"step {step}/{config.steps} loss {row['loss']:.4f} seconds {time.perf_counter() - began:.0f}",
                        flush=True,
                    )
            if saves:
                if finish_saving:
                    finish_saving()
                extra = {"batches": batches.get_state(), "seconds": time.perf_counter() - began}
                finish_saving = checkpoint.start_saving_training(
                    workdir,
                    step,
                    state.params,
                    state.opt_state,
                    model=config.model,
                    processor=config.processor,
                    files=tokenizer.files(),
                    extra=extra,
                    keep=config.keep,
                )
    if finish_saving:
        finish_saving()
    log.draw()
    return state


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), disable=not sys.stdout.isatty())


def run(argv):
    try:
        main(argv)
    # What the user can mend is one line; anything else is our fault and keeps its traceback.
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(run)
