r"""Asks a multimodal model.

    python infer.py --checkpoint DIR_OR_HUB_ID --image cat.jpg --prompt "What is in the image?"
    python infer.py --checkpoint DIR_OR_HUB_ID --image a.jpg --image b.jpg \
        --prompt "Image-1: <image>\nImage-2: <image>\nWhat differs?"
    python infer.py --checkpoint DIR_OR_HUB_ID --video clip.mp4 --prompt "What happens?"
    python infer.py --checkpoint DIR_OR_HUB_ID --pdf paper.pdf --pages 2-5 --prompt "Summarize."
    python infer.py --checkpoint DIR_OR_HUB_ID --image a.jpg --prompt "Where is ...?" --draw out.png
    python infer.py --checkpoint DIR_OR_HUB_ID --prompt @question.txt   # or --prompt - for stdin
    python infer.py --checkpoint DIR_OR_HUB_ID                # a conversation; try /help
    python infer.py --checkpoint BASE --adapter a=runs/a --adapter b=peft_dir --use b
    python infer.py --checkpoint DIR --requests questions.jsonl --output answers.jsonl
    python infer.py --checkpoint DIR --image cat.jpg --prompt "Think step by step ..." \
        --best_of 8 --critic CRITIC_DIR
    python infer.py --checkpoint DIR --requests questions.jsonl --output answers.jsonl \
        --best_of 8 --majority
    python infer.py --checkpoint DIR --hosts --fsdp 2 --requests ...     # on every host

\n in --prompt is a line break; \\n is a backslash and an n. LaTeX such as \nabla and \neq stays as
it is.

A line of --requests is {"prompt": TEXT, "image": PATH or [PATHS], "id": ANY}; image and id may be
missing, "video" and "document" may be there (docs/inference.md), and relative paths start at the
file's directory. Also "expected", "task", "label",
"category", "source", "answer" and "extra" may be there; the answer repeats them. Answers go to
--output in the order of the requests. A stopped run resumes with the same command; it is refused if
the model, the settings, the requests or their images have changed (OUTPUT.settings.json has the
settings). A request that cannot be answered has an "error" in its answer's place, and the status at
the end is 1; --on_error stop ends the run there.
"""

import contextlib
import functools

from absl import flags, logging

from internvl3_jax.inference import answer_flags, media_flags
from internvl3_jax.io import command_line
from internvl3_jax.io.command_line import UsageError
from internvl3_jax.parallel import host_flags

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(answer_flags)


def main(argv):
    if len(argv) > 1:
        raise UsageError(f"what is {argv[1]!r}? A question goes into --prompt")
    answer_flags.check_flags()
    # Imported here, since jax takes seconds to import.
    from internvl3_jax import Chat
    from internvl3_jax.inference import answering, input_checks, loading
    from internvl3_jax.inference.answerer import Answerer
    from internvl3_jax.inference.conversation import Conversation
    from internvl3_jax.inference.terminal_answers import TerminalAnswers

    # 1) Whatever can be checked before a model is loaded.
    requests, prompt = input_checks.check_inputs(FLAGS)
    with contextlib.ExitStack() as stack:
        logging.set_verbosity(logging.WARNING)  # orbax logs every step of every load
        if FLAGS.hosts:
            names = (host_flags.COORDINATOR, host_flags.PROCESSES, host_flags.PROCESS)
            loading.join_hosts(*(flag.value for flag in names))
        output = None if requests is None else open_output(requests, stack)

        # 2) The model, and what chooses among several answers.
        checkpoint = open_checkpoint(FLAGS.checkpoint, FLAGS.adapter)
        adapter = next(iter(checkpoint.adapters), None) if FLAGS.use is None else FLAGS.use or None
        model = {} if requests is None else answering.model_settings(checkpoint, adapter)
        options = answer_flags.chat_options()
        chat = Chat(checkpoint, adapter, cache=FLAGS.cache, donate=True, **options)
        choose, critic_settings = open_chooser(checkpoint, chat) if FLAGS.best_of else (None, {})

        # 3) A file of requests, one question, or a conversation.
        terminal = TerminalAnswers(FLAGS.json, FLAGS.stats, FLAGS.draw, FLAGS.draw_tiles)
        if requests is not None:
            answerer = Answerer(
                chat, choose, FLAGS.best_of or 1, FLAGS.on_error, FLAGS.batch_size, FLAGS.hosts
            )
            settings = answer_flags.asked_settings() | critic_settings | model
            answering.answer_file(
                answerer,
                requests,
                output,
                settings,
                retry_errors=FLAGS.retry_errors,
                stats=FLAGS.stats,
            )
        elif choose:
            terminal.ask_best(choose, prompt, FLAGS.image)
        elif prompt is not None:
            terminal.ask(chat, prompt, *media_flags.inputs())
        else:
            Conversation(chat, terminal.ask).run()


def open_output(requests: list[dict], stack: contextlib.ExitStack):
    """Opens and locks the output on the first host, and checks the answers that it holds."""
    import jax

    from internvl3_jax.inference.answer_file import AnswerFile

    if jax.process_index():
        return None
    output = stack.enter_context(AnswerFile(FLAGS.output, [FLAGS.requests]))
    output.check(requests, answer_flags.asked_settings())
    return output


def open_checkpoint(path: str, adapters: list[str] = ()):
    from internvl3_jax.inference import loading

    loading.use_compilation_cache(FLAGS.compilation_cache)
    devices = None if FLAGS["devices"].using_default_value else FLAGS.devices
    mesh = loading.make_mesh(devices, FLAGS.fsdp, FLAGS.hosts)
    names = ("accept_fingerprint", "verify", "allow_nonfinite", "weights", "quantize_tower")
    options = {name: FLAGS[name].value for name in names}
    return loading.open_checkpoint(path, dtype=FLAGS.dtype, mesh=mesh, adapters=adapters, **options)


def open_chooser(checkpoint, chat):
    """Returns a function that answers (question, images) pairs with the best of several answers,
    and the settings of the critic that it uses.
    """
    from internvl3_jax import Critic
    from internvl3_jax.inference import answering
    from internvl3_jax.reward.best_of_n import best_of_many

    critic, settings = None, {}
    if FLAGS.critic == FLAGS.checkpoint:
        critic = Critic(checkpoint, chat.generator, **answer_flags.critic_options())
    elif FLAGS.critic:
        critic_checkpoint = open_checkpoint(FLAGS.critic)
        values = answering.model_settings(critic_checkpoint, None)
        settings = {f"critic.{name}": value for name, value in values.items()}
        critic = Critic(critic_checkpoint, donate=True, **answer_flags.critic_options())
    return functools.partial(best_of_many, chat, critic, **answer_flags.best_of_options()), settings


def run(argv):
    from internvl3_jax.parallel import multihost

    with multihost.abort_together(), command_line.errors_in_one_line(ImportError):
        main(argv)


if __name__ == "__main__":
    command_line.run(run, ImportError, sections=answer_flags.SECTIONS)
