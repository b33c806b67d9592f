"""The card's questions to rows of VLMEvalKit's tables of images."""

import dataclasses
import pathlib
import threading

from internvl3_jax.evaluate import asking
from internvl3_jax.evaluate.loaders import kit
from internvl3_jax.evaluate.task import Row, Task
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.evaluate.variant import Variant, variants
from internvl3_jax.io.safe_files import FileError

# Name of a table -> the task that it belongs to, with this table alone.
TABLES: dict[str, Task] = {
    file.removesuffix(".tsv"): dataclasses.replace(task, files=(file,))
    for task in TASKS.values()
    if task.loader == "kit"
    for file in task.files
}


class CardRows:
    """Asks as `python -m internvl3_jax.evaluate` does.

    Args:
      root: folder of the tables.
      reasoning: "on", "off" or "auto", as of the command.
      size: of the card; None for another model.
      delta: V2PE step, or None.
    """

    def __init__(self, root: pathlib.Path, reasoning: str, size: str | None, delta):
        self._root, self._delta = root, None if delta is None else str(delta)
        self._reasoning, self._size = reasoning, size
        self._read: dict[str, dict[str, Row]] = {}
        self._reading = threading.Lock()

    def variant(self, dataset: str) -> Variant:
        """Returns the run of a data set of TABLES."""
        (found,) = variants(
            [TABLES[dataset]], [self._delta], reasoning=self._reasoning, size=self._size
        )
        return found

    def question(self, dataset: str, index) -> asking.Question:
        """Returns the question of a row, with its images.

        Raises:
          FileError: the table has no such row.
        """
        rows = self._rows(dataset)
        if str(index) not in rows:
            raise FileError(
                f"{dataset}.tsv in {self._root} has no row with the index {index}; is it the table "
                "that VLMEvalKit reads?"
            )
        return asking.make_question(self.variant(dataset), rows[str(index)])

    def _rows(self, dataset: str) -> dict[str, Row]:
        with self._reading:  # many threads begin with the same table
            if dataset not in self._read:
                loaded = kit.load(TABLES[dataset], self._root)
                self._read[dataset] = {row.id: row for row in loaded.rows}
            return self._read[dataset]
