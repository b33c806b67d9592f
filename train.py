"""Trains a model.

    python train.py --config configs/tiny_digits.py --workdir runs/tiny_digits
    python train.py --config configs/tiny_digits.py --workdir runs/other --config.optimizer.learning_rate=1e-3

Started again with the same --workdir it resumes exactly where its last complete checkpoint was. SIGTERM saves and leaves with status
143, on which schedulers start a job again; Ctrl-C does the same with status 130.
"""

import contextlib
import json
import pathlib
import signal
import sys
import time
import zlib

import jax
from absl import flags, logging

from internvl3_jax.checkpoints.fingerprint import fingerprint
from internvl3_jax.checkpoints.hf.released import travelling_files
from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.data.loader import Batches
from internvl3_jax.data.pipeline import make_tokenizer, source_names
from internvl3_jax.io import command_line
from internvl3_jax.io.checkpoint_paths import find
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel import multihost, sharding
from internvl3_jax.parallel.data_shards import Placement
from internvl3_jax.parallel.host_flags import COORDINATOR, PROCESS, PROCESSES
from internvl3_jax.training import checks, reference_model, run_log, settings
from internvl3_jax.training.evaluation import HeldOut
from internvl3_jax.training.metrics import Meter
from internvl3_jax.training.optimizer import Optimizer, make_optimizer
from internvl3_jax.training.param_table import component_table, format_table
from internvl3_jax.training.reference_model import load_reference
from internvl3_jax.training.run import UNKNOWN, Guard, Saver, Skipped, agreed_step, farewell, is_finished, restore_or_init
from internvl3_jax.training.start import Past
from internvl3_jax.training.step import TrainState, make_model, make_step
from internvl3_jax.training.workdir import held, named, same_run, save_config

flags.adopt_module_key_flags(settings)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, log, report.", required=True)


def main(argv) -> None:
    # What the user can fix is one line; anything else is our fault and keeps its traceback.
    with multihost.together(), command_line.errors_in_one_line(ImportError, FloatingPointError):
        run(argv)


def run(argv) -> None:
    """From the command line to the end of the run; what is cheap to check comes first, and nothing is written before it."""
    if len(argv) > 1:
        raise command_line.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save and load
    chosen, workdir = settings.load(), named(WORKDIR.value)
    check(chosen.config)
    multihost.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    mesh, is_first = make_mesh(chosen.config), jax.process_index() == 0
    with held(workdir) if is_first else contextlib.nullcontext():
        newest = agreed_step(workdir)
        config = same_run(lora.resolved(chosen.config), workdir, newest)
        if not is_finished(config, workdir, newest):
            if is_first:
                print(chosen.overview(config), flush=True)
            fit(config, workdir, mesh, newest)
        if is_first:
            print(farewell(config, workdir), flush=True)


def check(config: TrainConfig) -> None:
    """ValueError or ImportError naming what no run can be made of; nothing is read, and no device touched."""
    checks.validate(config)
    run_log.check_extras(config)
    if not config.data.source:
        raise ValueError("data.source is empty; name the meta JSON of your data: --config.data.source=meta.json")


def make_mesh(config: TrainConfig) -> jax.sharding.Mesh:
    """The mesh of all devices. ValueError if a setting makes no sense, or the model, the batch or an evaluation does not fit the mesh."""
    checks.validate(config)
    mesh, data = sharding.make_mesh(config.mesh), config.data
    reference_model.check(config)
    sharding.check_batch(mesh, data.rows, config.micro_batches, data.tokens_per_row, data.tiles_per_row)
    if jax.process_count() > 1 and config.evaluate_answers:
        raise ValueError("evaluate_answers is for one process: generation is not spread over several here")
    return mesh


def fit(config: TrainConfig, workdir: pathlib.Path, mesh: jax.sharding.Mesh | None = None, newest: int | None = UNKNOWN):
    """Starts or resumes a run on all devices, or those of `mesh`, and brings it to its end: (parameters, tokenizer).

    newest: the run's newest complete step, where `same_run` has been asked already; None: there is none.
    """
    checks.validate(config)
    config, mesh = lora.resolved(config), mesh or make_mesh(config)
    if newest == UNKNOWN:
        newest = agreed_step(workdir)
        config = same_run(config, workdir, newest)
    tokenizer = make_tokenizer(config.data)
    fingerprint(config.model, config.processor, tokenizer, config.param_dtype)  # what it refuses, the first save would refuse
    model = make_model(config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    placement = Placement(mesh, config.data)
    with jax.set_mesh(mesh), Batches(config.data, config.processor, tokenizer, placement.shards) as batches:
        state, past = restore_or_init(config, workdir, model, optimizer, batches, mesh, newest)
        if jax.process_index() == 0:
            print(format_table(component_table(state.params, config.optimizer)), flush=True)
        compared = load_reference(config, mesh, state)
        held_out = HeldOut(config, model, tokenizer) if config.held_out else None
        saver = Saver(config, workdir, placement, travelling(config) | tokenizer.files(), batches.identity)
        state = train(config, workdir, model, optimizer, state, compared, past, batches, placement, saver, held_out)
    return state.params, tokenizer


def travelling(config: TrainConfig) -> dict[str, bytes]:
    """What lies beside the weights that the run starts from, so that every step of it can be exported to serve in their place."""
    return travelling_files(find(config.init_from)) if config.init_from else {}


def train(
    config: TrainConfig,
    workdir: pathlib.Path,
    model: InternVL,
    optimizer: Optimizer,
    state: TrainState,
    compared: dict | None,
    past: Past,
    batches: Batches,
    placement: Placement,
    saver: Saver,
    held_out: HeldOut | None,
) -> TrainState:
    """Runs the remaining steps; logs, evaluates and saves as the configuration says. compared: parameters of MPO's reference."""
    sources = source_names(config.data)
    trained = optimizer.split(state.params)[0]
    meter = Meter(config, placement, sources, "vision" in trained or "vision" in trained.get(lora.SUBTREE, {}))
    guard = Guard(state.params, optimizer, sources)
    key = jax.device_put(jax.random.key(config.seed), state.step.sharding)
    before, began = past.seconds, time.perf_counter()
    first = int(state.step) + 1
    skipped = Skipped(workdir, first - 1)
    with run_log.Log(workdir, config, first - 1, jax.process_index() == 0) as log, multihost.termination() as stops:
        try:
            for step in range(first, config.steps + 1):
                log.profile(step)
                prepared = next(batches)
                batch = placement.arrays(prepared.batch)
                if step == first:
                    step_fn = compile_step(config, model, optimizer, len(sources), state, batch, key, compared)
                    save_config(config, workdir)  # nothing is left that may refuse it
                agrees = (step - first) % config.agree_every == 0
                if agrees:
                    # Compiling takes a host with a filled cache no time, and another one minutes.
                    multihost.check_agreement(
                        step, identity(config, prepared.batch, batches.identity), seconds=3600 if step == first else 300
                    )
                multihost.at(step)
                state, metrics = step_fn(state, batch, key, compared)
                if step == 1:
                    reference_model.check_start(config, metrics)
                meter.add(prepared, metrics)
                guard.add(step, metrics, prepared)
                past.seconds = before + time.perf_counter() - began
                last, stop = step == config.steps, stops(step)
                logs, saves = step % config.log_every == 0 or last, step % config.save_every == 0 or last or stop
                evaluates = held_out and config.evaluate_every and (step % config.evaluate_every == 0 or last)
                if logs or saves or evaluates:
                    guard.check()
                if logs:
                    left_out = {"skipped": count} if (count := skipped.note(step, prepared)) else {}
                    seen = {"seconds": past.seconds, "batch": placement.digest(prepared.batch)}
                    log.write(step, meter.row(step) | left_out | seen)
                if evaluates:
                    evaluate_held_out(step, config, workdir, state, compared, past, held_out, log)
                if saves:
                    saver.start(step, state, prepared, past)
                saver.poll(together=agrees or logs)
                if stop and not last:
                    saver.wait()
                    by = "Ctrl-C" if stop == signal.SIGINT else "SIGTERM"
                    print(f"stopped by {by}; step {step} is saved in {workdir}", flush=True)
                    sys.exit(128 + stop)
        finally:
            saver.wait()
    return state


def compile_step(
    config: TrainConfig, model: InternVL, optimizer: Optimizer, sources: int, state: TrainState, batch, key, compared
):
    """The compiled step; all processes do this beside each other, and only then wait for each other."""
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return make_step(config, model, optimizer, sources, places).lower(state, batch, key, compared).compile()


def identity(config: TrainConfig, batch, data: dict[str, str]) -> dict[str, str | int]:
    """What must be the same in every process. data: see data/identity.py."""
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape[1:])}" for name, array in sorted(batch.items()))
    return {
        "configuration": zlib.crc32(json.dumps(to_dict(config)).encode()),
        "a row of the batch": shapes,
        "the data": zlib.crc32(json.dumps(data).encode()),
        "jax": jax.__version__,
    }


def evaluate_held_out(
    step: int, config: TrainConfig, workdir, state: TrainState, compared: dict | None, past: Past, held_out: HeldOut, log
) -> None:
    """Held-out loss into the log and, if asked for, answers into answers.jsonl."""
    values = held_out.losses(state.params, state.shift, compared)
    log.write(step, values)
    if values["held_out"] < past.best:
        past.best, past.best_step = values["held_out"], step
    if config.evaluate_answers:
        answers = held_out.answers(state.params, config.evaluate_answers)
        run_log.append(workdir / run_log.ANSWERS, [{"step": step} | row for row in answers])


if __name__ == "__main__":
    settings.take_overrides(sys.argv)
    command_line.run(main)
