"""This package as an engine: prompts of `Chat.prepare`, answers of the engine for many requests."""

import pathlib

import jax.numpy as jnp
import numpy as np

from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.data.batch import Prompt
from internvl3_jax.data.text.media_tags import frame_lines
from internvl3_jax.inference.chat import Chat
from internvl3_jax.parity.folder import Case, Request
from internvl3_jax.parity.stages_run import Weights, model_stages, prompt_stages
from internvl3_jax.positions import parse_delta, rope_scaling


class JaxEngine:
    """Runs a checkpoint.

    Args:
      checkpoint: of `internvl3_jax.load`: a path of any kind.
      dtype: name of the dtype of the computation.
    """

    def __init__(self, checkpoint: str | pathlib.Path, dtype: str = "float32"):
        self.checkpoint = load(checkpoint, dtype=jnp.dtype(dtype))
        self.chat = Chat(self.checkpoint)
        self.weights = Weights(self.checkpoint.config, self.checkpoint.params, jnp.dtype(dtype))

    def run(self, root: pathlib.Path, case: Case) -> dict[str, np.ndarray | str]:
        """Returns all stages of a case."""
        return self.stages(root, case.request, self.prompt(root, case.request))

    def prompt(self, root: pathlib.Path, request: Request) -> Prompt:
        """Returns the prompt of a request. Frames are images of one tile with the frame's label."""
        question, more = request.question, {}
        if request.frames:
            label = self.checkpoint.processor.frame_label
            question, more = frame_lines(len(request.frames), label) + question, {"max_tiles": 1}
        return self.chat.prepare(
            question,
            [str(root / path) for path in request.images + request.frames],
            delta=request.delta,
            max_new_tokens=request.max_new_tokens,
            **more,
        )

    def stages(self, root: pathlib.Path, request: Request, prompt: Prompt) -> dict:
        (answer,) = self.chat.answer_many(
            [prompt], max_new_tokens=request.max_new_tokens, delta=request.delta
        )
        stages = prompt_stages(prompt, self.checkpoint.tokenizer)
        stages |= model_stages(self.weights, prompt, self.scaling(request))
        stages["answer_ids"] = np.asarray(answer.token_ids, np.int64)
        stages["answer"] = answer.text
        return stages

    def scaling(self, request: Request) -> str:
        """Returns the rope scaling of a request."""
        delta = self.checkpoint.processor.delta
        if request.delta is not None:
            delta = parse_delta(request.delta)
        return rope_scaling(self.checkpoint.config.language, [delta])
