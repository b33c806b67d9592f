"""Runs the server: `python -m internvl3_jax.serve --checkpoint DIR`."""

import argparse
import contextlib
import logging
import os
import pathlib
import sys

from internvl3_jax.inference.progress import progress_line
from internvl3_jax.io import command_line
from internvl3_jax.io.safe_files import reason
from internvl3_jax.serve import arguments

# Names of this machine, for requests that come without a key.
_LOCAL = ("localhost", "127.0.0.1", "::1")


def main(options: argparse.Namespace) -> int:
    """Loads the model and serves; returns the exit status."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("internvl3_jax.serve").setLevel(logging.INFO)
    # 1) What can be checked before a model is loaded.
    try:
        from internvl3_jax.serve import running
        from internvl3_jax.serve.service import log
        from internvl3_jax.serve.web import Page, read_examples
    except ImportError as error:
        raise ValueError(
            f"the server needs further packages ({reason(error)}); in a clone of this repository: "
            "pip install -e '.[serve]'"
        ) from error
    import jax

    from internvl3_jax.inference import loading
    from internvl3_jax.parallel import multihost

    settings = _settings(options)
    loading.named_adapters(options.adapter)
    loading.check_cache(options.compilation_cache)
    examples = read_examples(options.web_examples) if options.web_examples else ()
    if options.hosts:
        loading.join_hosts(options.coordinator, options.processes, options.process)
    with multihost.abort_together(), contextlib.ExitStack() as stack:
        # 2) The model and its engine. The hosts but the first follow it.
        if jax.process_index():
            engine, _, _ = _load(options)
            engine.follow()
            return 0
        bound = stack.enter_context(running.bind(options.host, options.port))
        engine, checkpoint, critic = _load(options)
        # 3) Serve.
        service = _service(options, checkpoint, engine, settings | {"critic": critic})
        page = Page(examples) if options.web else None
        log.info("models %s on %s", ", ".join(service.models), running.address(bound))
        if page is not None:
            log.info("the page is %s/", running.address(bound))
        status = running.Runner(service, bound, options.drain_seconds, page).run()
        engine.close()
        return status


def _load(options: argparse.Namespace) -> tuple:
    """Returns an engine whose programs are compiled, its checkpoint, and a critic."""
    from internvl3_jax.inference import loading
    from internvl3_jax.inference.engine.engine import Engine
    from internvl3_jax.inference.engine.lockstep import LockstepEngine
    from internvl3_jax.reward.critic import Critic

    loading.use_compilation_cache(options.compilation_cache)
    names = ("verify", "accept_fingerprint", "allow_nonfinite", "weights", "quantize_tower")
    load_options = {name: getattr(options, name) for name in names}
    load_options["mesh"] = loading.make_mesh(options.devices, options.fsdp, options.hosts)
    load_options["dtype"] = options.dtype
    checkpoint = loading.open_checkpoint(
        options.checkpoint, adapters=options.adapter, **load_options
    )
    engine = (LockstepEngine if options.hosts else Engine).of(
        checkpoint,
        options.cache,
        donate=True,
        rows=options.rows,
        max_length=options.max_length,
        max_queue=options.max_queue,
        image_bytes=options.image_cache_mb << 20,
    )
    critic = None
    if options.critic == options.checkpoint:
        critic = Critic(checkpoint, engine.generator)
    elif options.critic is not None:
        critic = Critic(loading.open_checkpoint(options.critic, **load_options), donate=True)
    if not options.no_warm_up:
        with progress_line("compiling"):
            engine.warm_up()
    return engine, checkpoint, critic


def _service(options: argparse.Namespace, checkpoint, engine, settings: dict):
    from internvl3_jax.serve.service import Service

    return Service(
        checkpoint,
        engine,
        name=options.model_name or pathlib.PurePath(options.checkpoint).name,
        api_key=options.api_key,
        hosts=_LOCAL if options.api_key is None and arguments.is_loopback(options.host) else (),
        log_prompts=options.log_prompts,
        workers=min(16, os.cpu_count() or 1),
        **settings,
    )


def _settings(options: argparse.Namespace) -> dict:
    """Returns `options`, `limits` and `sources` of `Service`."""
    from internvl3_jax.inference.options import Options
    from internvl3_jax.serve.fetch import Fetcher
    from internvl3_jax.serve.limits import Limits
    from internvl3_jax.serve.media import Sources

    names = ("system", "thinking", "max_tiles", "tiles", "max_total_tiles", "allow_truncated")
    chat_options = Options(
        max_new_tokens=options.max_new_tokens,
        delta=None if options.delta is None else [options.delta],
        **{name: getattr(options, name) for name in names},
    )
    limits = Limits(
        body_bytes=options.max_body_mb << 20,
        body_seconds=options.max_body_seconds,
        seconds=options.max_seconds,
        messages=options.max_messages,
        images=options.max_images,
        frames=options.max_frames,
        pages=options.max_pages,
        tiles=options.max_request_tiles,
        image_pixels=options.max_image_pixels,
        answers=options.max_n,
        new_tokens=options.max_new_tokens,
        held_bytes=options.max_held_mb << 20,
        step_seconds=options.max_step_seconds,
    )
    hosts = frozenset(host.lower() for host in options.allow_hosts)
    fetcher = Fetcher(hosts, limits.body_bytes, private=options.allow_private_hosts)
    sources = Sources(tuple(options.roots), fetcher, limits.body_bytes)
    return {"options": chat_options, "limits": limits, "sources": sources}


if __name__ == "__main__":
    sys.exit(command_line.call(lambda: main(arguments.parse()), ImportError))
