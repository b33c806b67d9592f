"""A file of requests to a file of answers: in batches, resumed after a kill, and with an error in
the place of what cannot be answered.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import to_dict
from internvl3_jax.inference.answer_file import AnswerFile
from internvl3_jax.inference.chat import Answer, Chat
from internvl3_jax.io.terminal import excerpt, one_line
from internvl3_jax.parallel import multihost

ON_ERROR = ("note", "stop")
FIELDS = ("text", "token_ids", "prompt_tokens", "tiles", "seconds", "finish")


def as_json(answer: Answer) -> dict:
    fields = dataclasses.asdict(answer)
    return {name: fields[name] for name in FIELDS}


def weights_of(checkpoint, adapter: str | None = None) -> str:
    """A hash of the parameters that answer, the same wherever they are stored and however they are
    split.
    """
    found = tree_hash(by_path(checkpoint.params))
    if adapter is None:
        return found
    own = checkpoint.adapters[adapter]
    return f"{found}+{tree_hash(by_path({'lora': own.lora, 'whole': own.whole}))}"


def model_settings(checkpoint, adapter: str | None) -> dict:
    """What answers depend on beside the questions and options: parameters, precision, the rule for
    tiles and prompts.
    """
    processor = {
        f"processor.{name}": value for name, value in to_dict(checkpoint.processor).items()
    }
    return {
        "weights": weights_of(checkpoint, adapter),
        "dtype": checkpoint.model.dtype.name,
    } | processor


@dataclasses.dataclass
class Asking:
    """How requests are answered.

    Attributes:
      chat: Reads the requests and, without `choose`, answers them.
      choose: Answers a list of (question, images) pairs with the best of `candidates` answers each,
          such as
        `reward.best_of_n.best_of_many`. Each result has `as_json()`. None: one answer each.
      candidates: Answers that `choose` generates for each question.
      on_error: "note" writes a row with the error for a request that cannot be answered; "stop"
          ends the run.
      batch_size: Answers that are generated and written together.
      hosts: Whether several hosts answer together.
    """

    chat: Chat
    choose: Callable[[Sequence[tuple]], list] | None = None
    candidates: int = 1
    on_error: str = "note"
    batch_size: int = 8
    hosts: bool = False

    @property
    def requests_per_batch(self) -> int:
        return max(1, self.batch_size // self.candidates)

    def rows(self, batch: Sequence[dict], first: int) -> list[dict]:
        """The output's rows of some requests. first: number of the first, from 1."""
        prompts, errors = {}, {}
        for number, request in enumerate(batch):
            try:
                prompts[number] = self.chat.prepare(
                    request["prompt"], request["image"], where=_where(request)
                )
            except (ValueError, OSError) as error:
                errors[number] = self._noted(request, error)
        if self.hosts:
            multihost.assert_same_on_all_hosts(
                first, {"requests that cannot be read": str(sorted(errors))}, seconds=3600
            )
        found = {}
        if prompts:
            try:
                found = dict(zip(prompts, self._answers(batch, prompts), strict=True))
            except (ValueError, OSError) as error:
                found = self._one_by_one(batch, prompts, error)
        return [
            request["asked"] | (found.get(number) or errors[number])
            for number, request in enumerate(batch)
        ]

    def _one_by_one(self, batch: Sequence[dict], prompts: dict, error: Exception) -> dict:
        """Rows of requests of which at least one failed while it was answered."""
        if len(prompts) == 1:
            return {number: self._noted(batch[number], error) for number in prompts}
        found = {}
        for number, prompt in prompts.items():
            try:
                (found[number],) = self._answers(batch, {number: prompt})
            except (ValueError, OSError) as own:
                found[number] = self._noted(batch[number], own)
        return found

    def _answers(self, batch: Sequence[dict], prompts: dict) -> list[dict]:
        if self.choose is None:
            return [as_json(answer) for answer in self.chat.answer_many(list(prompts.values()))]
        pairs = [(batch[number]["prompt"], batch[number]["image"]) for number in prompts]
        return [choice.as_json() for choice in self.choose(pairs)]

    def _noted(self, request: dict, error: Exception) -> dict:
        text = str(error)
        if self.on_error == "stop":
            where = _where(request)
            raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error
        return {"error": one_line(text)}


def _where(request: dict) -> str:
    return f"{request['where']} (id {excerpt(request['id'])})"


def ask_again(asking: Asking, requests: Sequence[dict], output: AnswerFile) -> int:
    """Asks the requests once more that have an error in the output, batch by batch; returns how
    many there were.
    """
    failed = [number for number, row in enumerate(output.answers) if "error" in row]
    size = asking.requests_per_batch
    for start in range(0, len(failed), size):
        numbers = failed[start : start + size]
        rows = asking.rows([requests[number] for number in numbers], numbers[0] + 1)
        output.correct(dict(zip(numbers, rows, strict=True)))
    return len(failed)


def answer_all(
    asking: Asking, requests: Sequence[dict], output: AnswerFile | None, answered: int
) -> None:
    """Answers the requests from number `answered` (from 0) on and adds them to the output, batch by
    batch.

    output: None on all hosts but the first.
    """
    from rich.progress import track

    size = asking.requests_per_batch
    batches = range(answered, len(requests), size)
    for start in track(
        batches, description="answering", disable=not (sys.stderr.isatty() and output is not None)
    ):
        rows = asking.rows(requests[start : start + size], start + 1)
        if output is not None:
            output.add(rows)


def failures(requests: Sequence[dict], rows: Sequence[dict]) -> str:
    """How many rows have an error, and the first one; "" if none has."""
    failed = [number for number, row in enumerate(rows) if "error" in row]
    if not failed:
        return ""
    where, text = _where(requests[failed[0]]), rows[failed[0]]["error"]
    first = text if text.startswith(where) else f"{where}: {text}"
    return (
        f'{len(failed)} of {len(rows)} requests could not be answered; their lines say why in "error", and --retry_errors asks them '
        f"again. The first: {first}"
    )


def stats(rows: Sequence[dict], seconds: float) -> str:
    """Totals of the answers of this run."""
    tokens = sum(row.get("new_tokens", len(row.get("token_ids", ()))) for row in rows)
    cut = sum(row.get("finish") == "length" for row in rows)
    more = f"; {cut} were cut off by --max_new_tokens" if cut else ""
    return f"{len(rows)} answers, {tokens:,} new tokens in {seconds:.3f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s{more}"
