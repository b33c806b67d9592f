"""Evaluation during training: eval losses and sample answers."""

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
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel.collectives import constrain
from internvl3_jax.training.loss_choice import make_loss
from internvl3_jax.training.objective import SftLoss, batch_totals

# Longest answer, in tokens.
_LONGEST = 256


class Evaluator:
    """Reads the evaluation data once; every evaluation takes the same batches and questions."""

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
        per_batch = [
            jax.device_get(self.step(params, loss_state, ref_params, batch))
            for batch in self.batches
        ]
        sums, metrics = jax.tree.map(lambda *values: np.sum(values, axis=0), *per_batch)
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
        """Answers the last turn of the first `count` conversations greedily.

        The conversations are taken from the sources in turn. Images are at ordinary positions.

        Returns:
          A row for each: its source and row, question, expected answer and answer.
        """
        config, tokenizer = self.config, self.tokenizer
        sources = open_sources(self.data)
        samples = [(source, row) for row in range(count) for source in sources if row < len(source)]
        builder = ExampleBuilder(self.data, config.processor, tokenizer)
        generator = Generator(
            config.model,
            jax.device_get(lora.merged(params, config.lora)),
            stop_ids=[tokenizer.token_id(token) for token in config.processor.stop_tokens],
            donate=True,
        )
        options = GenerationConfig(_LONGEST, Sampling(), (0,), config.model.language.rope_scaling)
        rows = []
        for source, row in samples[:count]:
            read = builder.read(source, row, np.random.default_rng(0))
            tiles = [builder.cut(image, read) for image in read.images]
            messages, deltas = read.messages[:-1], [UNITS] * len(tiles)
            prompt = make_prompt(messages, tiles, tokenizer, config.processor, deltas)
            (ids,) = generator.generate([prompt], options)
            rows.append(
                {
                    "source": source.name,
                    "row": row,
                    "question": read.messages[-2]["content"],
                    "expected": read.messages[-1]["content"],
                    "answer": tokenizer.decode(ids).strip(),
                }
            )
        return rows


def eval_data_config(config: TrainConfig) -> DataConfig:
    """Returns how the evaluation data are read: all of it, at ordinary positions."""
    settings = {
        "exclude_file": "",
        "shards": 1,
        "workers": 0,
        "deltas": ("1",),
        "text_fraction": -1.0,
    }
    return dataclasses.replace(config.data, source=config.eval.source, **settings)


def _losses(loss_fn: SftLoss, params, loss_state, ref_params, batch):
    """Returns sums of weighted losses and of weights, f32[2,num_sources], and a dict of f32[].

    The dict is empty without pairs. With them it holds sums of the metrics over the pairs, and the
    number of pairs.
    """
    totals = batch_totals(batch)
    loss, (metrics, _) = loss_fn(params, batch, None, loss_state, totals, ref_params)
    sums = jnp.stack([metrics.pop("source_loss"), metrics.pop("source_weight")])
    if metrics:
        metrics = {f"eval_{name}": value * totals.pairs for name, value in metrics.items()}
        metrics |= {"eval_loss": loss * totals.pairs, "pairs": totals.pairs}
    return constrain(sums, None, None), jax.tree.map(constrain, metrics)
