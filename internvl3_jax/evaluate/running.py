"""Opens the model and answers all tasks: the part of the command that needs jax."""

import argparse
import contextlib
import functools
from collections.abc import Mapping, Sequence

import jax
from absl import logging

from internvl3_jax.checkpoints.checkpoint import Checkpoint
from internvl3_jax.evaluate import asking, card
from internvl3_jax.evaluate.task import Loaded, Task
from internvl3_jax.evaluate.variant import Variant, answers_path, variants
from internvl3_jax.inference import answering, loading
from internvl3_jax.inference.chat import Chat
from internvl3_jax.io.checkpoint_paths import check_exists
from internvl3_jax.parallel import multihost
from internvl3_jax.reward.best_of_n import best_of_many
from internvl3_jax.reward.critic import Critic
from internvl3_jax.sizes import SIZES

Files = Mapping[str, Mapping[str, tuple[str, bool | None]]]


def answer_all(
    options: argparse.Namespace, tasks: Sequence[Task], loaded: Mapping[str, Loaded], files: Files
) -> tuple[dict, list[Variant], dict[str, list[dict]] | None]:
    """Answers what the output does not hold yet.

    Args:
      options: of the command.
      loaded: task -> rows.
      files: task -> digests of its files.

    Returns:
      (facts about the model, the runs, run -> answers); None in place of the answers on
      all hosts but the first.
    """
    logging.set_verbosity(logging.WARNING)  # orbax logs every step of every load
    for path in filter(None, (options.checkpoint, options.critic)):
        check_exists(path)
    loading.check_cache(options.compilation_cache)
    if options.hosts:
        loading.join_hosts(options.coordinator, options.processes, options.process)
    with multihost.abort_together() if options.hosts else contextlib.nullcontext():
        loading.use_compilation_cache(options.compilation_cache)
        checkpoint = open_checkpoint(options, options.checkpoint)
        settings = answering.model_settings(checkpoint, None)
        size = options.card or size_of(checkpoint)
        runs = variants(
            tasks,
            options.delta or [None],
            options.frames or (),
            options.reasoning,
            size,
            options.best_of,
            options.max_new_tokens,
        )
        model = {
            "checkpoint": str(options.checkpoint),
            "weights": settings["weights"],
            "dtype": settings["dtype"],
            "card": size,
            "delta": checkpoint.processor.delta,
            "deltas": options.delta,
            "frames": options.frames,
            "reasoning": options.reasoning,
            "best_of": options.best_of,
            "critic": options.critic,
            "max_new_tokens": options.max_new_tokens,
        }
        chat, choose = Chat(checkpoint, donate=True), None
        if options.best_of:
            critic, critic_settings = open_critic(options, checkpoint, chat)
            choose = functools.partial(best_of_many, chat, critic, n=options.best_of)
            settings |= critic_settings
        answers = {}
        for run in runs:
            rows = loaded[run.task.name].rows[: options.limit]
            answerer = asking.TaskAnswerer(
                chat, run, len(rows), options.batch_size, options.hosts, choose
            )
            digests = {name: digest for name, (digest, _) in files[run.task.name].items()}
            answering.note(f"{run.name}: {len(rows)} questions")
            answers[run.name] = asking.run(
                answerer,
                rows,
                answers_path(options.output, run),
                settings | run.settings() | {"data": digests},
                jax.process_index() == 0,
            )
    return model, runs, answers if jax.process_index() == 0 else None


def open_checkpoint(options: argparse.Namespace, path: str) -> Checkpoint:
    mesh = loading.make_mesh(options.devices, options.fsdp, options.hosts)
    return loading.open_checkpoint(path, dtype=options.dtype, mesh=mesh)


def open_critic(
    options: argparse.Namespace, checkpoint: Checkpoint, chat: Chat
) -> tuple[Critic, dict]:
    """Returns the critic and what its choice depends on."""
    if options.critic == options.checkpoint:
        return Critic(checkpoint, chat.generator), {"critic": "the model itself"}
    opened = open_checkpoint(options, options.critic)
    settings = answering.model_settings(opened, None)
    return Critic(opened, donate=True), {
        f"critic.{name}": value for name, value in settings.items()
    }


def size_of(checkpoint: Checkpoint) -> str | None:
    """Returns the card's name of the size of a model; None for another model."""
    names = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "rope_scaling")
    found = checkpoint.config
    for size in card.SIZES:
        model = SIZES[size.lower()]
        same = [getattr(found.language, name) == getattr(model.language, name) for name in names]
        if all(same) and found.vision.hidden_size == model.vision.hidden_size:
            return size
    return None
