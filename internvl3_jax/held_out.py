"""What is never trained on: its loss, and answers to look at."""

import dataclasses
import functools

import jax
import numpy as np

from internvl3_jax import lora
from internvl3_jax.config import UNITS, LoraConfig, TrainConfig
from internvl3_jax.data.batch import make_prompt
from internvl3_jax.data.batches import Batches
from internvl3_jax.data.pipeline import open_sources, source_names
from internvl3_jax.data.prepare import Preparer
from internvl3_jax.generate import Generator, Run
from internvl3_jax.losses import chunked_cross_entropy
from internvl3_jax.model import InternVL
from internvl3_jax.sampling import Sampling
from internvl3_jax.sharding import constrain

_LONGEST = 256  # tokens of an answer


class HeldOut:
    """Reads `config.held_out` once; the same batches and questions serve every time."""

    def __init__(self, config: TrainConfig, model: InternVL, tokenizer):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.data = dataclasses.replace(
            config.data, source=config.held_out, drop_list="", shards=1, workers=0, deltas=("1",), language_share=-1.0
        )
        self.names = source_names(self.data)
        with Batches(self.data, config.processor, tokenizer) as batches:
            self.batches = [next(batches).batch for _ in range(config.evaluate_batches)]
        self.step = jax.jit(functools.partial(_losses, model, config.lora, chunk=config.loss_chunk, sources=len(self.names)))

    def losses(self, params) -> dict[str, float]:
        """ "held_out" is the loss by the training's weights over all batches; "held_out/SOURCE" that of each source."""
        sums = np.sum([jax.device_get(self.step(params, batch)) for batch in self.batches], axis=0)  # [2, sources]
        values = {"held_out": float(sums[0].sum() / sums[1].sum())}
        if len(self.names) > 1:
            values |= {f"held_out/{self.names[i]}": float(sums[0, i] / sums[1, i]) for i in np.flatnonzero(sums[1])}
        return values

    def answers(self, params, count: int) -> list[dict]:
        """Greedy answers to the last turn of the first `count` conversations, taken from the sources in turn."""
        sources = open_sources(self.data)
        places = [(source, row) for row in range(count) for source in sources if row < len(source)][:count]
        preparer = Preparer(self.data, self.config.processor, self.tokenizer)
        stop_ids = [self.tokenizer.token_id(token) for token in self.config.processor.stop_tokens]
        generator = Generator(self.config.model, jax.device_get(lora.merged(params, self.config.lora)), stop_ids=stop_ids)
        rows = []
        for source, row in places:
            read = preparer.read(source, row, np.random.default_rng(0))
            tiles = [preparer.cut(picture, read) for picture in read.pictures]
            prompt = make_prompt(read.messages[:-1], tiles, self.tokenizer, self.config.processor, [UNITS] * len(tiles))
            run = Run(_LONGEST, Sampling(), (0,), self.config.model.language.rope_scaling)
            (ids,) = generator.generate([prompt], run)
            question, expected = read.messages[-2]["content"], read.messages[-1]["content"]
            answer = self.tokenizer.decode(ids).strip()
            rows.append({"source": source.name, "row": row, "question": question, "expected": expected, "answer": answer})
        return rows


def _losses(model: InternVL, adapters: LoraConfig, params, batch, *, chunk: int, sources: int):
    """f32[2,sources]: sums of weighted losses and of weights."""
    variables = lora.variables(params, adapters)
    hidden = model.apply(variables, batch, method=InternVL.hidden)
    kernel = model.apply(variables, method=InternVL.head_kernel)
    weights = batch["loss_weights"]
    _, losses = chunked_cross_entropy(hidden, kernel, batch["targets"], weights, model.config.language.vocab_size, chunk)
    member = jax.nn.one_hot(batch["sources"], sources)
    sums = jax.numpy.einsum("nbt,bts->ns", jax.numpy.stack([losses * weights, weights]), member)
    return constrain(sums, None, None)
