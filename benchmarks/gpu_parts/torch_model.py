"""transformers' InternVL with random weights, on the card (in --smoke on the CPU, in float32)."""

import torch
import transformers

from benchmarks.gpu_parts.timing import repeat
from convert.config_json import to_hf
from internvl3_jax.sizes import SIZES


class Peer:
    """The model and its inputs.

    Attributes:
      tiles: tiles of the prompt.
      length: tokens of the prompt, images included.
    """

    def __init__(self, size: str, smoke: bool, dtype=torch.bfloat16):
        self.smoke, self.device = smoke, "cpu" if smoke else "cuda"
        self.dtype = torch.float32 if smoke else dtype
        self.config = SIZES["tiny" if smoke else size]
        self.settings = transformers.InternVLConfig.from_dict(
            to_hf(self.config, None, "hf", str(self.dtype).removeprefix("torch."))
        )
        self.settings._attn_implementation = "sdpa"
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with torch.device(self.device):
            self.model = transformers.InternVLForConditionalGeneration(self.settings)
        torch.set_default_dtype(torch.float32)
        self.tiles, self.text = (3, 40) if smoke else (13, 512)
        self.length = self.tiles * self.config.tokens_per_tile + self.text

    def pixels(self, tiles: int):
        side = self.config.vision.image_size
        return torch.randn(tiles, 3, side, side, device=self.device, dtype=self.dtype)

    def words(self, rows: int, length: int | None = None):
        return torch.randint(0, 400, (rows, length or self.length), device=self.device)

    def prompt(self):
        ids = self.words(1)
        ids[0, 2 : 2 + self.tiles * self.config.tokens_per_tile] = self.settings.image_token_id
        return ids

    def measured(self, call, seconds: float = 1.5, least: int = 3) -> dict:
        """Times a call, and gives the peak of the memory during it."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def once():
            call()
            self.wait()

        once()
        values = repeat(once, seconds, least, self.smoke)
        if self.device == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def decode_ms(self, ids, count: int, **options) -> dict:
        """Times a token of generate(): the difference of a long and a short answer."""

        def generate(new: int):
            return self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )

        with torch.inference_mode():
            # A static cache is as long as the answer, and compiled for its length.
            short = self.measured(lambda: generate(2), 0, 2)
            long = self.measured(lambda: generate(2 + count), 0, 2)
        step = (long["ms"] - short["ms"]) / count
        rows = len(ids)
        return {
            "ms_per_token": step,
            "tokens_s": 1e3 * rows / step,
            "rows": rows,
            "tokens": ids.shape[1],
            "new_tokens": count,
            "peak_gib": long.get("peak_gib"),
        }
