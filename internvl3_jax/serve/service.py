"""The state that all requests of a server share."""

import asyncio
import concurrent.futures
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence

from internvl3_jax.inference.options import Options
from internvl3_jax.io.strict_json import suggestion
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.critic_scores import CriticScores
from internvl3_jax.serve.engine_thread import EngineThread
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.grammar import Vocabulary
from internvl3_jax.serve.limits import Budget, Limits
from internvl3_jax.serve.media import Sources
from internvl3_jax.serve.metrics import Metrics
from internvl3_jax.serve.pending import Pending

log = logging.getLogger("internvl3_jax.serve")


class Service:
    """A checkpoint, the engine that answers for it, and the rules of the server.

    Args:
      checkpoint: of `internvl3_jax.load`.
      engine: of internvl3_jax.inference.engine, with a `max_length`.
      name: what requests call the model. Its adapters are called by their own names.
      options: of answers, where a request does not give its own.
      limits: of requests.
      sources: where images may come from.
      critic: of `internvl3_jax.Critic`, which chooses among several answers; or None.
      api_key: that requests must have; None: no key.
      hosts: what a request's Host header may say; none: anything.
      log_prompts: write the texts of requests and answers to the log.
      workers: threads that read and cut images.

    Attributes:
      failure: what ended the engine; None while it runs.
      draining: whether no more requests are taken.
    """

    def __init__(
        self,
        checkpoint,
        engine,
        *,
        name: str,
        options: Options | None = None,
        limits: Limits | None = None,
        sources: Sources | None = None,
        critic=None,
        api_key: str | None = None,
        hosts: Sequence[str] = (),
        log_prompts: bool = False,
        workers: int = 4,
    ):
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        self.config = checkpoint.config
        self.language = checkpoint.config.language
        self.engine, self.name = engine, name
        self.adapters = tuple(checkpoint.adapters)
        if name in self.adapters:
            raise ValueError(
                f"the model and an adapter are both called {name!r}; name them with --model_name "
                "and --adapter NAME=DIR"
            )
        self.options = options or Options()
        self.limits, self.sources = limits or Limits(), sources or Sources()
        self.critic = None if critic is None else CriticScores(critic, self.sources)
        self.hosts, self.log_prompts = tuple(hosts), log_prompts
        self.vocabulary = Vocabulary(self.tokenizer, self.language.vocab_size, engine.stop_ids)
        self.metrics = Metrics(engine)
        self.budget = Budget(self.limits.held_bytes)
        self.created = int(time.time())
        self.pool = concurrent.futures.ThreadPoolExecutor(workers, "prepare")
        self.failure: BaseException | None = None
        self.draining = False
        self._key = None if api_key is None else _digest(api_key)
        self._pending: set[Pending] = set()
        self._thread: EngineThread | None = None
        self._on_failure: Callable[[], None] = lambda: None

    # --- the engine's life ------------------------------------------------------------------------

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Starts the engine's thread. Called by the event loop that answers.

        Args:
          on_failure: called by the event loop after the engine has failed.
        """
        loop = asyncio.get_running_loop()
        self._on_failure = on_failure

        def failed(error: BaseException) -> None:
            self.failure = error
            loop.call_soon_threadsafe(self._fail)

        self._thread = EngineThread(self.engine, failed)
        self._thread.start()

    def _fail(self) -> None:
        self.end_all(
            ApiError("the engine has failed; the server is ending", 500, code="engine_failed")
        )
        self._on_failure()

    def end_all(self, error: ApiError) -> None:
        """Ends all requests in the engine with an error."""
        for pending in list(self._pending):
            pending.fail(error)

    def stop(self, seconds: float = 10.0) -> bool:
        """Returns whether the engine's thread has ended within some seconds."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        return self._thread is None or self._thread.stop(seconds)

    def check_ready(self) -> None:
        """Raises ApiError if no request can be answered now."""
        if self.failure is not None:
            raise ApiError("the engine has failed; the server is ending", 503, code="engine_failed")
        if self.draining:
            raise ApiError(
                "the server is ending and takes no more requests; ask another one",
                503,
                code="draining",
                headers={"Retry-After": "5"},
            )

    def check_health(self) -> None:
        """Raises ApiError if no request can be answered now, or if a round does not end."""
        self.check_ready()
        seconds = self._thread.seconds_in_round if self._thread is not None else 0.0
        if seconds > self.limits.step_seconds:
            raise ApiError(
                f"a round of the engine has taken {seconds:,.0f} s; restart the server if it "
                "continues (--max_step_seconds)",
                503,
                code="engine_stuck",
            )

    # --- requests ---------------------------------------------------------------------------------

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of an id; b"" for one of the padding of the vocabulary."""
        known = self.vocabulary.token_bytes
        return known[token] if token < len(known) else b""

    def enter(self, pending: Pending) -> None:
        self._pending.add(pending)

    def leave(self, pending: Pending) -> None:
        """Takes a request out of the engine, complete or not."""
        self._pending.discard(pending)
        pending.cancel()

    @property
    def num_pending(self) -> int:
        """Requests whose responses are not complete."""
        return len(self._pending)

    @property
    def models(self) -> list[str]:
        """Names of the model and of its adapters."""
        return [self.name, *self.adapters]

    def adapter_of(self, model: str | None) -> str | None:
        """Returns the adapter that a request's model means; None is the base.

        Raises:
          ApiError: there is no such model.
        """
        if model is None or model == self.name:
            return None
        if model not in self.adapters:
            near = suggestion(model, self.models)
            raise ApiError(
                f"there is no model {excerpt(model)}{near}; there are {', '.join(self.models)}",
                404,
                param="model",
                code="model_not_found",
            )
        return model

    def check_key(self, authorization: str | None) -> None:
        """Raises ApiError unless the Authorization header has the key, if one is needed."""
        if self._key is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        # Compares digests, so that the time does not depend on the key's length either.
        same = secrets.compare_digest(_digest(key.strip()), self._key)
        if scheme.lower() != "bearer" or not same:
            given = "is wrong" if authorization else "is missing"
            raise ApiError(
                f"the API key {given}; send the header Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
