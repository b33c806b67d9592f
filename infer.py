r"""Asks a multimodal model.

    python infer.py --checkpoint DIR_OR_HUB_ID --image cat.jpg --prompt "What is in the picture?"
    python infer.py --checkpoint DIR_OR_HUB_ID --image a.jpg --image b.jpg --prompt "Image-1: <image>\nImage-2: <image>\nWhat differs?"
    python infer.py --checkpoint DIR_OR_HUB_ID --prompt @question.txt               # a file's text; --prompt - reads stdin
    python infer.py --checkpoint DIR_OR_HUB_ID                                      # a conversation; /help lists its commands
    python infer.py --checkpoint BASE --adapter a=runs/a --adapter b=peft_dir --use b    # in a conversation also /adapter NAME
    python infer.py --checkpoint DIR_OR_HUB_ID --requests questions.jsonl --output answers.jsonl --batch_size 8
    python infer.py --checkpoint DIR --image cat.jpg --prompt "Think step by step ..." --best_of 8 --critic CRITIC_DIR
    python infer.py --checkpoint DIR --requests questions.jsonl --output answers.jsonl --best_of 8 --majority
    python infer.py --checkpoint DIR --hosts --fsdp 2 --requests ...              # the same command on every host

\n in --prompt is a line break; \\n is a backslash and an n. LaTeX such as \nabla and \neq stays as
it is.

A line of --requests is {"prompt": TEXT, "image": PATH or [PATHS], "id": ANY}; image and id may be
missing, and relative paths start at the file's directory. Also "expected", "task", "label",
"category", "source", "answer" and "extra" may be there; the answer repeats them. Answers go to
--output in the order asked; lines already answered there are not asked again, if they are of the
same model and settings (OUTPUT.settings.json has them). A request that cannot be answered has an
"error" in its answer's place, and the status at the end is 1; --on_error stop ends the run there.
"""

import contextlib
import functools
import os
import sys
import time

from absl import flags, logging

from internvl3_jax.inference import answer_flags
from internvl3_jax.io import command_line
from internvl3_jax.io.command_line import UsageError
from internvl3_jax.io.terminal import printable
from internvl3_jax.parallel import host_flags

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(answer_flags)


def main(argv):
    if len(argv) > 1:
        raise UsageError(f"what is {argv[1]!r}? A question goes into --prompt")
    answer_flags.check_flags()
    requests, prompt = check_inputs()
    with contextlib.ExitStack() as stack:
        logging.set_verbosity(logging.WARNING)  # orbax tells every step of every load
        if FLAGS.hosts:
            join_hosts()
        output = open_output(requests, stack) if requests is not None else None
        checkpoint = open_checkpoint(FLAGS.checkpoint, FLAGS.adapter)
        chat = open_chat(checkpoint)
        critic, of_critic = open_critic(checkpoint, chat) if FLAGS.critic else (None, {})
        if requests is not None:
            answer_requests(checkpoint, chat, critic, of_critic, requests, output)
        elif FLAGS.best_of:
            ask_best(chat, critic, prompt, FLAGS.image)
        elif prompt is not None:
            ask(chat, prompt, FLAGS.image)
        else:
            converse(chat)


# --- before a model is loaded --------------------------------------------------------------------


def check_inputs() -> tuple[list[dict] | None, str | None]:
    """(the requests, the prompt). ValueError for whatever can be seen to be wrong without a model."""
    from internvl3_jax.data.media.images import open_image
    from internvl3_jax.inference import loading, prompts
    from internvl3_jax.inference.chat import Options
    from internvl3_jax.inference.loading import named_adapters
    from internvl3_jax.inference.requests import check_images, read_requests
    from internvl3_jax.io.checkpoint_paths import check_exists

    Options(**answer_flags.chat_options())
    names = named_adapters(FLAGS.adapter)
    if FLAGS.use and FLAGS.use not in names:
        raise ValueError(
            f"--use is {FLAGS.use!r}; there is no such --adapter: {', '.join(names) or 'none is given'}"
        )
    FLAGS.image = [os.path.expanduser(image) for image in FLAGS.image]
    for image in FLAGS.image:
        open_image(image, max_pixels=FLAGS.max_image_pixels, allow_truncated=FLAGS.allow_truncated)
    for name in [*names.values(), *([FLAGS.critic] if FLAGS.critic else [])]:
        check_exists(name)
    loading.check_cache(FLAGS.compilation_cache)
    prompt = None if FLAGS.prompt is None else prompts.given(FLAGS.prompt)
    if prompt is not None:
        images = len(FLAGS.image)
        if 0 < (tags := prompt.count("<image>")) < images:
            raise ValueError(
                f"{images} pictures, but {tags} <image> tags in --prompt; write one for each, or none"
            )
        if len(FLAGS.delta) > 1 and len(FLAGS.delta) != images:
            raise ValueError(
                f"{len(FLAGS.delta)} deltas for {images} pictures; give one, or one per picture"
            )
    if not FLAGS.requests:
        return None, prompt
    requests = read_requests(FLAGS.requests)
    check_images(requests, FLAGS.on_error)
    return requests, prompt


def open_output(requests: list[dict], stack: contextlib.ExitStack):
    """The output, locked, its answers checked as far as that goes without a model; None on all
    hosts but the first.
    """
    from internvl3_jax.inference.answer_file import AnswerFile

    if not is_first_host():
        return None
    output = stack.enter_context(AnswerFile(FLAGS.output, [FLAGS.requests]))
    output.check(requests, answer_flags.asked_settings())
    return output


# --- the model -----------------------------------------------------------------------------------


def join_hosts() -> None:
    """All hosts compute; the first alone says and writes anything."""
    import jax

    from internvl3_jax.parallel import multihost

    with contextlib.redirect_stdout(sys.stderr):
        multihost.initialize(
            *(
                flag.value
                for flag in (host_flags.COORDINATOR, host_flags.PROCESSES, host_flags.PROCESS)
            )
        )
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def open_checkpoint(path: str, adapters: list[str] = ()):
    from internvl3_jax.inference import loading

    loading.use_compilation_cache(FLAGS.compilation_cache)
    devices = None if FLAGS["devices"].using_default_value else FLAGS.devices
    mesh = loading.make_mesh(devices, FLAGS.fsdp, FLAGS.hosts)
    options = {
        name: FLAGS[name].value for name in ("accept_fingerprint", "verify", "allow_nonfinite")
    }
    checkpoint = loading.open_checkpoint(
        path, dtype=FLAGS.dtype, mesh=mesh, adapters=adapters, **options
    )
    if checkpoint.directory.parent.name == "checkpoints":
        note(f"step {checkpoint.directory.name} of {checkpoint.directory.parents[1]}")
    return checkpoint


def chosen_adapter(checkpoint) -> str | None:
    return next(iter(checkpoint.adapters), None) if FLAGS.use is None else FLAGS.use or None


def open_chat(checkpoint):
    from internvl3_jax import Chat

    return Chat(checkpoint, chosen_adapter(checkpoint), **answer_flags.chat_options())


def open_critic(checkpoint, chat):
    """(the critic, what its scores depend on)"""
    from internvl3_jax import Critic
    from internvl3_jax.inference import answering

    if FLAGS.critic == FLAGS.checkpoint:
        return Critic(checkpoint, chat.generator, **answer_flags.critic_options()), {}
    own = open_checkpoint(FLAGS.critic)
    return Critic(own, **answer_flags.critic_options()), {
        f"critic.{name}": value for name, value in answering.model_settings(own, None).items()
    }


# --- one question, and conversations -------------------------------------------------------------


def ask(chat, question: str, images: list[str]) -> None:
    """Prints the answer as it comes, or its JSON at the end."""
    from internvl3_jax.inference import answering
    from internvl3_jax.io import jsonl

    for piece in chat.stream(question, images):
        if not FLAGS.json:
            print(printable(piece), end="", flush=True)
    print(jsonl.dumps(answering.as_json(chat.last)) if FLAGS.json else "")
    if FLAGS.stats:
        print_stats(chat.last)
    if chat.last.finish == "length" and not FLAGS.json:
        note(
            f"the answer was cut off after {len(chat.last.token_ids)} tokens; --max_new_tokens allows more"
        )


def ask_best(chat, critic, question: str, images: list[str]) -> None:
    """Prints the chosen answer, or JSON with all candidates."""
    from internvl3_jax.io import jsonl
    from internvl3_jax.reward.best_of_n import best_of_many

    (choice,) = best_of_many(chat, critic, [(question, images)], **answer_flags.best_of_options())
    print(jsonl.dumps(choice.as_json()) if FLAGS.json else printable(choice.text))
    if FLAGS.stats:
        note(choice.table())


def print_stats(answer) -> None:
    per_token = (
        f"{1000 * answer.seconds_per_token:.1f} ms per token"
        if answer.seconds_per_token
        else "one token"
    )
    note(
        f"first token {answer.first_token_seconds:.3f} s, then {per_token}; {answer.prompt_tokens} prompt tokens "
        f"({answer.reused_tokens} reused), tiles {answer.tiles}, {len(answer.token_ids)} new tokens in {answer.seconds:.3f} s, "
        f"finish: {answer.finish}"
    )


def note(text: str) -> None:
    """Beside the answers, from the first host."""
    if is_first_host():
        print(printable(text), file=sys.stderr)


def converse(chat) -> None:
    from internvl3_jax.inference.conversation import Conversation

    Conversation(chat, ask).run()


# --- files of questions --------------------------------------------------------------------------


def answer_requests(
    checkpoint, chat, critic, of_critic: dict, requests: list[dict], output
) -> None:
    """Answers --requests in batches; each is appended to --output as a whole, so that a stopped run
    is resumed where it was.
    """
    from internvl3_jax.inference import answering
    from internvl3_jax.reward.best_of_n import best_of_many

    settings = (
        answer_flags.asked_settings()
        | answering.model_settings(checkpoint, chosen_adapter(checkpoint))
        | of_critic
    )
    if output is not None:
        output.start(requests, settings)
    answered = of_first_host(len(output.answers) if output is not None else 0)
    if answered:
        note(f"{FLAGS.output} holds {answered} of {len(requests)} answers; resuming with the rest")
        if output is not None and any("run" not in row for row in output.answers):
            note(
                f"warning: {FLAGS.output} does not say how some of them were made; they are taken as made with these settings"
            )
    choose = (
        functools.partial(best_of_many, chat, critic, **answer_flags.best_of_options())
        if FLAGS.best_of
        else None
    )
    asking = answering.Asking(
        chat, choose, FLAGS.best_of or 1, FLAGS.on_error, FLAGS.batch_size, FLAGS.hosts
    )
    began = time.perf_counter()
    if FLAGS.retry_errors:
        note(
            f"{answering.ask_again(asking, requests, output)} requests with an error were asked again"
        )
    answering.answer_all(asking, requests, output, answered)
    if output is None:
        return
    if FLAGS.stats:
        note(answering.stats(output.answers[answered:], time.perf_counter() - began))
    note(f"{len(requests) - answered} answers written to {FLAGS.output}")
    if failed := answering.failures(requests, output.answers):
        raise ValueError(f"{FLAGS.output}: {failed}")


def is_first_host() -> bool:
    import jax

    return jax.process_index() == 0


def of_first_host(count: int) -> int:
    """What it counts there, on every host."""
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(count))) if FLAGS.hosts else count


def run(argv):
    from internvl3_jax.parallel import multihost

    with multihost.abort_together(), command_line.errors_in_one_line(ImportError):
        main(argv)


if __name__ == "__main__":
    command_line.run(run, ImportError, sections=answer_flags.SECTIONS)
