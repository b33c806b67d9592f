"""Trains a model.

    python train.py --config configs/tiny_digits.py --workdir runs/tiny_digits
    python train.py --config configs/finetune.py:OpenGVLab/InternVL3-2B --workdir runs/mine \\
        --config.data.source=meta.json --config.optimizer.learning_rate=1e-5

Running it again with the same --workdir resumes from the last complete checkpoint, bit for bit.
SIGTERM finishes the step, saves it and exits with status 143, on which schedulers start a job
again. Ctrl-C does the same with status 130.
"""

import contextlib
import dataclasses
import pathlib
import signal
import sys
import time
from typing import NamedTuple

import jax
from absl import flags, logging

from internvl3_jax import cli
from internvl3_jax.checkpoints.fingerprint import fingerprint
from internvl3_jax.checkpoints.hf.released import companion_files
from internvl3_jax.checkpoints.verification import agreed_step
from internvl3_jax.config import TrainConfig
from internvl3_jax.data.loader import BatchLoader, HostBatch
from internvl3_jax.data.pipeline import make_tokenizer, source_names
from internvl3_jax.io import command_line
from internvl3_jax.io.checkpoint_paths import check_exists, resolve_checkpoint
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel import host_flags, host_memory, multihost, sharding
from internvl3_jax.parallel.data_shards import DataShards
from internvl3_jax.training import checks, reference_model, run_log, settings
from internvl3_jax.training.console import Console, shorten_warnings
from internvl3_jax.training.evaluation import Evaluator
from internvl3_jax.training.guards import FiniteCheck, SkipLog, compare_hosts
from internvl3_jax.training.history import RunHistory, farewell, is_finished
from internvl3_jax.training.metrics import MetricsAggregator
from internvl3_jax.training.optimizer import Optimizer, make_optimizer
from internvl3_jax.training.param_table import component_table, format_table
from internvl3_jax.training.saver import AsyncSaver
from internvl3_jax.training.state import restore_or_init
from internvl3_jax.training.step import TrainState, make_model, make_step
from internvl3_jax.training.workdir import held, named, same_run, save_config

UNKNOWN = -1  # as `newest` of fit: the newest step has not been looked up

flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(host_flags)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, log, report.", required=True
)


# --- the command line ----------------------------------------------------------------------------


def main(argv) -> None:
    # User errors print one line; bugs keep their traceback.
    with (
        multihost.abort_together(),
        command_line.errors_in_one_line(ImportError, FloatingPointError),
    ):
        run(argv)


def run(argv) -> None:
    """Runs from the command line to the end of the training."""
    # Cheap checks come first; nothing is written before them.
    if len(argv) > 1:
        raise command_line.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    shorten_warnings()
    logging.set_verbosity(logging.WARNING)  # orbax logs every step of every save and load
    chosen, workdir = settings.load(), named(WORKDIR.value)
    checks.check_run(chosen.config)
    host_memory.keep_freed_memory()
    multihost.initialize(
        host_flags.COORDINATOR.value, host_flags.PROCESSES.value, host_flags.PROCESS.value
    )
    mesh, is_first = make_mesh(chosen.config), jax.process_index() == 0

    # One process holds the directory's lock.
    with held(workdir) if is_first else contextlib.nullcontext():
        newest = agreed_step(workdir)
        config = same_run(lora.freeze_base(chosen.config), workdir, newest)
        if not is_finished(config, newest):
            if is_first:
                print(chosen.overview(config), flush=True)
            fit(config, workdir, mesh, newest)
        if is_first:
            print(cli.as_typed(farewell(config, workdir)), flush=True)


def make_mesh(config: TrainConfig) -> jax.sharding.Mesh:
    """Returns the mesh of all devices.

    Raises:
      ValueError: The configuration, the model or the batch does not fit it.
    """
    checks.validate(config)
    mesh, data = sharding.make_mesh(config.mesh), config.data
    reference_model.check(config)
    sharding.check_batch(
        mesh, data.rows, config.micro_batches, data.tokens_per_row, data.tiles_per_row
    )
    if jax.process_count() > 1 and config.eval.answers:
        raise ValueError(
            "eval.answers is for one process; generation is not distributed over several"
        )
    return mesh


def fit(
    config: TrainConfig,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
    newest: int | None = UNKNOWN,
) -> dict:
    """Starts or resumes a run and trains to its last step.

    Args:
      mesh: None takes all devices.
      newest: The newest complete step of the run, or None. By default it is looked up, and the
        configuration is compared with the run's.

    Returns:
      The parameters.
    """
    checks.validate(config)
    config, mesh = lora.freeze_base(config), mesh or make_mesh(config)
    if newest == UNKNOWN:
        newest = agreed_step(workdir)
        config = same_run(config, workdir, newest)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        return train(setup(config, workdir, mesh, newest, stack)).params


# --- setup ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainingRun:
    """State of a run. `ref_params` are MPO's; `key` seeds drop path and dropout."""

    config: TrainConfig
    workdir: pathlib.Path
    model: InternVL
    optimizer: Optimizer
    loader: BatchLoader
    placement: DataShards
    state: TrainState
    history: RunHistory
    ref_params: dict | None
    evaluator: Evaluator | None
    saver: AsyncSaver
    meter: MetricsAggregator
    guard: FiniteCheck
    skipped: SkipLog
    key: jax.Array


def setup(
    config: TrainConfig,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    newest: int | None,
    stack: contextlib.ExitStack,
) -> TrainingRun:
    """Opens the data, builds the model, and restores step `newest` or initializes the parameters.

    Args:
      stack: Closes the data when the training ends.
    """
    # Data and model. What is missing is noticed before anything large is read, and the fingerprint
    # raises what the first save would raise.
    for name in filter(None, (config.init_from, config.lora.init_from, config.loss.ref_model)):
        check_exists(name)
    tokenizer = make_tokenizer(config.data)
    fingerprint(config.model, config.processor, tokenizer, config.param_dtype)
    model, optimizer = make_model(config), make_optimizer(config.optimizer, config.steps)
    placement = DataShards(mesh, config.data)
    loader = stack.enter_context(
        BatchLoader(config.data, config.processor, tokenizer, placement.shards)
    )
    evaluator = Evaluator(config, model, tokenizer) if config.eval.source else None

    # Parameters and optimizer state
    state, history = restore_or_init(config, workdir, model, optimizer, loader, mesh, newest)
    if jax.process_index() == 0:
        print(format_table(component_table(state.params, config.optimizer)), flush=True)
    ref_params = reference_model.load_reference(config, mesh, state)
    # The initial checkpoint's tokenizer and config files go into every step, for exports.
    files = companion_files(resolve_checkpoint(config.init_from)) if config.init_from else {}
    files |= tokenizer.files()

    # Logging and saving
    sources, trainable = source_names(config.data), optimizer.split(state.params)[0]
    trains_vision = "vision" in trainable or "vision" in trainable.get(lora.SUBTREE, {})
    return TrainingRun(
        config,
        workdir,
        model,
        optimizer,
        loader,
        placement,
        state,
        history,
        ref_params,
        evaluator,
        saver=AsyncSaver(config, workdir, placement, files, loader.identity),
        meter=MetricsAggregator(config, placement, sources, trains_vision),
        guard=FiniteCheck(state.params, optimizer, sources),
        skipped=SkipLog(workdir, int(state.step)),
        key=jax.device_put(jax.random.key(config.seed), state.step.sharding),
    )


# --- the loop ------------------------------------------------------------------------------------


def train(run: TrainingRun) -> TrainState:
    """Runs the remaining steps; logs, evaluates and saves when they are due."""
    config, first, step_fn, prepared = run.config, int(run.state.step) + 1, None, None
    before, started_at = run.history.seconds, time.perf_counter()
    log = run_log.Log(run.workdir, config, first - 1, jax.process_index() == 0)
    with log, multihost.preemption_signal() as preemption_signal, run.saver:
        for step in range(first, config.steps + 1):
            log.profile(step)
            prepared = next_batch(run, log.console, step, prepared, preemption_signal)
            batch = run.placement.arrays(prepared.batch)
            if step == first:
                step_fn = compile_step(run, batch, log.console)
                save_config(config, run.workdir)  # nothing can be refused any more
            due = cadence(config, step, first)
            if due.compare:
                compare_hosts(config, run.loader.identity, prepared.batch, step, step == first)
            multihost.report_step(step)

            run.state, metrics = step_fn(run.state, batch, run.key, run.ref_params)
            if step == 1 and config.loss.kind == "mpo":
                reference_model.check_start(config, metrics)
            run.meter.add(prepared, metrics)
            run.guard.add(step, metrics, prepared)
            run.history.seconds = before + time.perf_counter() - started_at

            stop = preemption_signal(step)
            if due.log or due.evaluate or due.save or stop:
                run.guard.check()
            if due.log:
                log_step(run, log, step, prepared)
            if due.evaluate:
                evaluate(run, log, step)
            if due.save or stop:
                run.saver.save(step, run.state, prepared, run.history)
            run.saver.poll(together=due.compare or due.log)
            if stop and step < config.steps:
                leave(run, log.console, step, stop)
    return run.state


def next_batch(
    run: TrainingRun, console: Console, step: int, previous: HostBatch | None, preemption_signal
) -> HostBatch:
    """Returns the batch of a step.

    A signal to all processes of a job ends the workers too, so that no batch comes. The step before
    is then saved and the process left, as after a signal to this process alone.
    """
    try:
        return next(run.loader)
    except Exception:
        stop = 0 if jax.process_count() > 1 else preemption_signal(step)
        if not stop or previous is None:
            raise
        run.guard.check()
        if run.saver.step != step - 1:
            run.saver.save(step - 1, run.state, previous, run.history)
        leave(run, console, step - 1, stop)


class Due(NamedTuple):
    """Actions that are due at a step."""

    compare: bool  # the hosts compare what they train
    log: bool
    evaluate: bool
    save: bool


def cadence(config: TrainConfig, step: int, first: int) -> Due:
    """Returns what is due at a step. first: The first step of this process."""
    last = step == config.steps
    evaluates = bool(config.eval.source and config.eval.every)
    return Due(
        compare=(step - first) % config.host_check_every == 0,
        log=last or step % config.logging.every == 0,
        evaluate=evaluates and (last or step % config.eval.every == 0),
        save=last or step % config.checkpoint.every == 0,
    )


def compile_step(run: TrainingRun, batch: dict, console: Console):
    """Compiles the train step. Processes compile side by side and meet afterwards."""
    console.say("compiling the train step ...")
    started_at = time.perf_counter()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)
    num_sources = len(run.meter.sources)
    step_fn = make_step(run.config, run.model, run.optimizer, num_sources, shardings)
    compiled = step_fn.lower(run.state, batch, run.key, run.ref_params).compile()
    console.say(f"compiled in {time.perf_counter() - started_at:.1f} s")
    run.meter.restart(has_batch=True)
    console.start_clock()
    return compiled


def log_step(run: TrainingRun, log: run_log.Log, step: int, prepared: HostBatch) -> None:
    """Writes a row of the log: means over the steps since the last one."""
    values = run.meter.row(step)
    if count := run.skipped.note(step, prepared):
        values["skipped"] = count
    values |= {"seconds": run.history.seconds, "batch": run.placement.digest(prepared.batch)}
    log.write(step, values)


def evaluate(run: TrainingRun, log: run_log.Log, step: int) -> None:
    """Logs the loss on the evaluation data and, if asked for, appends answers to answers.jsonl."""
    started_at = time.perf_counter()
    values = run.evaluator.losses(run.state.params, run.state.loss_state, run.ref_params)
    log.write(step, values)
    run.history.note_eval(step, values["eval_loss"])
    if run.config.eval.answers:
        answers = run.evaluator.answers(run.state.params, run.config.eval.answers)
        run_log.append(run.workdir / run_log.ANSWERS, [{"step": step} | row for row in answers])
    run.meter.exclude(time.perf_counter() - started_at)


def leave(run: TrainingRun, console: Console, step: int, stop: int) -> None:
    """Ends the process after a signal, with the step saved."""
    run.saver.wait()
    name = "Ctrl-C" if stop == signal.SIGINT else "SIGTERM"
    console.say(f"stopped by {name}; step {step} is saved in {run.workdir}")
    sys.exit(128 + stop)


if __name__ == "__main__":
    settings.take_overrides(sys.argv)
    command_line.run(main)
