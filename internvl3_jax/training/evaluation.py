"""What is never trained on: its loss, and answers to look at."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.config import UNITS, DataConfig, TrainConfig
from internvl3_jax.data.batch import make_prompt
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.pipeline import open_sources, source_names
from internvl3_jax.data.sources.meta import MetaError
from internvl3_jax.inference.generator import GenerationConfig, Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.training.objective import SftLoss, batch_totals, make_loss

_LONGEST = 256  # tokens of an answer


class Evaluator:
    """Reads `config.eval.source` once; the same batches and questions serve every time."""

    def __init__(self, config: TrainConfig, model: InternVL, tokenizer):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.data = eval_data_config(config)
        try:
            self.names = source_names(self.data)
        except MetaError as error:
            raise MetaError(str(error).replace("data.source", "eval.source", 1)) from error
        with BatchLoader(self.data, config.processor, tokenizer) as batches:
            self.batches = [next(batches).batch for _ in range(config.eval.batches)]
        loss_fn = make_loss(dataclasses.replace(config, data=self.data), model, len(self.names))
        self.step = jax.jit(functools.partial(_losses, loss_fn))

    def losses(self, params, loss_state=(), ref_params=None) -> dict[str, float]:
        """Returns the losses over all batches: "eval_loss", and "eval_loss/SOURCE" of each source.

        Under MPO "eval_loss" is the full loss and "eval_loss/SOURCE" the chosen answers'
        cross-entropy. The train step's means over pairs are there too, such as
        "eval_reward_accuracy". `loss_state` and `ref_params` are the train step's.
        """
        found = [
            jax.device_get(self.step(params, loss_state, ref_params, batch))
            for batch in self.batches
        ]
        sums, metrics = jax.tree.map(lambda *values: np.sum(values, axis=0), *found)
        values = {"eval_loss": float(sums[0].sum() / sums[1].sum())}
        values |= {
            name: float(total / metrics["pairs"])
            for name, total in metrics.items()
            if name != "pairs"
        }
        if len(self.names) > 1:
            values |= {
                f"eval_loss/{self.names[i]}": float(sums[0, i] / sums[1, i])
                for i in np.flatnonzero(sums[1])
            }
        return values

    def answers(self, params, count: int) -> list[dict]:
        """Greedy answers to the last turn of the first `count` conversations, taken from the
        sources in turn.
        """
        sources = open_sources(self.data)
        places = [(source, row) for row in range(count) for source in sources if row < len(source)][
            :count
        ]
        preparer = ExampleBuilder(self.data, self.config.processor, self.tokenizer)
        stop_ids = [self.tokenizer.token_id(token) for token in self.config.processor.stop_tokens]
        generator = Generator(
            self.config.model,
            jax.device_get(lora.merged(params, self.config.lora)),
            stop_ids=stop_ids,
        )
        rows = []
        for source, row in places:
            read = preparer.read(source, row, np.random.default_rng(0))
            tiles = [preparer.cut(picture, read) for picture in read.images]
            prompt = make_prompt(
                read.messages[:-1],
                tiles,
                self.tokenizer,
                self.config.processor,
                [UNITS] * len(tiles),
            )
            run = GenerationConfig(
                _LONGEST, Sampling(), (0,), self.config.model.language.rope_scaling
            )
            (ids,) = generator.generate([prompt], run)
            question, expected = read.messages[-2]["content"], read.messages[-1]["content"]
            answer = self.tokenizer.decode(ids).strip()
            rows.append(
                {
                    "source": source.name,
                    "row": row,
                    "question": question,
                    "expected": expected,
                    "answer": answer,
                }
            )
        return rows


def eval_data_config(config: TrainConfig) -> DataConfig:
    """How the held-out sources are read."""
    settings = {
        "exclude_file": "",
        "shards": 1,
        "workers": 0,
        "deltas": ("1",),
        "text_fraction": -1.0,
    }
    return dataclasses.replace(config.data, source=config.eval.source, **settings)


def _losses(loss_fn: SftLoss, params, loss_state, ref_params, batch):
    """Returns f32[2,sources], sums of weighted losses and of weights; of pairs also f32[] sums over
    them, and their number.
    """
    totals = batch_totals(batch)
    loss, (metrics, _) = loss_fn(params, batch, None, loss_state, totals, ref_params)
    sums = jnp.stack([metrics.pop("source_loss"), metrics.pop("source_weight")])
    if metrics:
        metrics = {f"eval_{name}": value * totals.pairs for name, value in metrics.items()}
        metrics |= {"eval_loss": loss * totals.pairs, "pairs": totals.pairs}
    return constrain(sums, None, None), jax.tree.map(constrain, metrics)
