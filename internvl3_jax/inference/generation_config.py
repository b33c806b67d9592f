"""Settings of a batch's generation."""

import dataclasses

from internvl3_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings of a batch's generation.

    Attributes:
      max_new_tokens: tokens per answer.
      sampling: how they are sampled.
      seeds: one per row; several rows may continue one prompt (see `Generator.start`).
      scaling: rope scaling, "none" under V2PE.
      prompt_lookup: guess tokens from the prompt and the answer, and check several in a run; see
        prompt_lookup.py.

    Raises:
      ValueError: `prompt_lookup` with a temperature.
    """

    max_new_tokens: int
    sampling: Sampling
    seeds: tuple[int, ...]
    scaling: str
    prompt_lookup: bool = False

    def __post_init__(self):
        if self.prompt_lookup and not self.sampling.is_greedy:
            raise ValueError(
                f"temperature is {self.sampling.temperature}; prompt_lookup needs greedy decoding, "
                "a temperature of 0"
            )
