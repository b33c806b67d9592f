"""Trains a model.

    python train.py --config configs/tiny_digits.py --workdir runs/tiny_digits
    python train.py --config configs/tiny_digits.py --workdir runs/other --config.optimizer.learning_rate=1e-3

Started again with the same --workdir it goes on exactly where its last complete checkpoint was. SIGTERM saves and leaves with status
143, on which schedulers start a job again.
"""

import functools
import json
import pathlib
import sys
import time
import zlib

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

from convert.source import travelling_files
from internvl3_jax import report
from internvl3_jax.components import component_table, format_table
from internvl3_jax.config import TrainConfig
from internvl3_jax.data.batches import Batches
from internvl3_jax.data.pipeline import make_tokenizer, source_names
from internvl3_jax.evaluate import evaluate
from internvl3_jax.find import find
from internvl3_jax.held_out import HeldOut
from internvl3_jax.meter import Meter
from internvl3_jax.model import InternVL
from internvl3_jax.optimizer import Optimizer, make_optimizer
from internvl3_jax.run import TERMINATED, Guard, Past, Saver, Skipped, restore_or_init, save_config, termination
from internvl3_jax.train_step import TrainState, train_step

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config() -> TrainConfig.", lock_config=False)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, log, report.", required=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
    save_config(config, workdir)
    params, tokenizer = fit(config, workdir)
    if config.evaluate_per_task:
        scores = evaluate(config, params, tokenizer)
        report.write(workdir, config, scores)
        print(report.table(scores))


def fit(config: TrainConfig, workdir: pathlib.Path):
    """Starts or goes on with a run and brings it to its end: (parameters, tokenizer)."""
    tokenizer = make_tokenizer(config.data)
    model = make_model(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Batches(config.data, config.processor, tokenizer, jax.process_index(), jax.process_count()) as batches:
        state, past = restore_or_init(config, workdir, model, optimizer, batches)
        print(format_table(component_table(state.params, config.optimizer)))
        held_out = HeldOut(config, model, tokenizer) if config.held_out else None
        saver = Saver(config, workdir, travelling(config) | tokenizer.files())
        state = train(config, workdir, model, optimizer, state, past, batches, saver, held_out)
    return state.params, tokenizer


def travelling(config: TrainConfig) -> dict[str, bytes]:
    """What lies beside the weights that the run starts from, so that every step of it can be exported to serve in their place."""
    return travelling_files(find(config.init_from)) if config.init_from else {}


def make_model(config: TrainConfig) -> InternVL:
    remat = {"remat_vision": config.remat_vision, "remat_language": config.remat_language}
    return InternVL(config.model, jnp.dtype(config.compute_dtype), scan_unroll=config.scan_unroll, **remat)


def make_step(config: TrainConfig, model: InternVL, optimizer: Optimizer, sources: int):
    """(state, batch, key) -> (state, metrics), compiled; the state is donated."""
    scaling = "none" if set(config.data.deltas) != {"1"} else None  # V2PE switches dynamic NTK off
    settings = {"micro_batches": config.micro_batches, "loss_chunk": config.loss_chunk, "num_sources": sources}
    return jax.jit(functools.partial(train_step, model, optimizer, scaling=scaling, **settings), donate_argnums=0)


def train(
    config: TrainConfig,
    workdir: pathlib.Path,
    model: InternVL,
    optimizer: Optimizer,
    state: TrainState,
    past: Past,
    batches: Batches,
    saver: Saver,
    held_out: HeldOut | None,
) -> TrainState:
    """Runs the remaining steps; logs, evaluates and saves as the configuration says."""
    sources = source_names(config.data)
    step_fn = make_step(config, model, optimizer, len(sources))
    meter, guard = Meter(config, sources, "vision" in optimizer.split(state.params)[0]), Guard(state.params, optimizer, sources)
    skipped, key = Skipped(workdir), jax.random.key(config.seed)
    before, began = past.seconds, time.perf_counter()
    with report.Log(workdir, config, int(state.step)) as log, termination() as is_terminated:
        try:
            for step in range(int(state.step) + 1, config.steps + 1):
                log.profile(step)
                prepared = next(batches)
                state, metrics = step_fn(state, prepared.batch, key)
                meter.add(prepared, metrics)
                guard.add(step, metrics, prepared)
                past.seconds = before + time.perf_counter() - began
                last, stop = step == config.steps, is_terminated()
                logs, saves = step % config.log_every == 0 or last, step % config.save_every == 0 or last or stop
                evaluates = held_out and config.evaluate_every and (step % config.evaluate_every == 0 or last)
                if logs or saves or evaluates:
                    guard.check()
                if logs:
                    left_out = {"skipped": count} if (count := skipped.note(prepared)) else {}
                    log.write(step, meter.row(step) | left_out | {"seconds": past.seconds, "batch": digest(prepared.batch)})
                if evaluates:
                    evaluate_held_out(step, config, workdir, state, past, held_out, log)
                if saves:
                    saver.start(step, state, prepared, past)
                if stop and not last:
                    saver.wait()
                    print(f"stopped by SIGTERM; step {step} is saved in {workdir}", flush=True)
                    sys.exit(TERMINATED)
        finally:
            saver.wait()
    return state


def evaluate_held_out(step: int, config: TrainConfig, workdir, state: TrainState, past: Past, held_out: HeldOut, log) -> None:
    """Held-out loss into the log and, if asked for, answers into answers.jsonl."""
    values = held_out.losses(state.params)
    log.write(step, values)
    if values["held_out"] < past.best:
        past.best, past.best_step = values["held_out"], step
    if config.evaluate_answers:
        with (workdir / "answers.jsonl").open("a", encoding="utf-8") as file:
            for row in held_out.answers(state.params, config.evaluate_answers):
                file.write(json.dumps({"step": step} | row, ensure_ascii=False) + "\n")


def digest(batch) -> int:
    """Tells whether two runs saw the same bytes."""
    return functools.reduce(lambda crc, name: zlib.crc32(batch[name], crc), sorted(batch), 0)


def run(argv):
    try:
        main(argv)
    # What the user can mend is one line; anything else is our fault and keeps its traceback.
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(run)
