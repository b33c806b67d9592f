"""The two sides of cpu_peer.py, each in a process of its own, and the weights and inputs that both
get.

    python benchmarks/cpu_peer_sides.py weights|jax|torch DIRECTORY        prints one JSON object on its last line

DIRECTORY holds settings.json; `weights` puts a model there, the others measure it.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time

import numpy as np

TEXT_TOKENS = 64  # around one tile of 256 visual tokens
LOGITS_KEPT = 64  # last positions whose logits are compared


@dataclasses.dataclass
class Settings:
    layers: int | None  # of the tower and of the decoder; None: all
    vocabulary: int
    rounds: int
    repeats: int  # of every case in a round, after one that is not timed
    tokens: int  # decoded after the first one
    threads: int


def main() -> None:
    role, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    settings = Settings(**json.loads((directory / "settings.json").read_text()))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    roles = {"weights": make_weights, "jax": measure_jax, "torch": measure_torch}
    print(json.dumps(roles[role](directory, settings)))


def make_weights(directory: pathlib.Path, settings: Settings) -> dict:
    """Writes config.json, tokenizer and random weights in transformers' layout; names and shapes
    are those of transformers itself.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    from convert.config_json import to_hf
    from internvl3_jax.config import ModelConfig

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
    from internvl3_jax.sizes import SIZES

    files = tiny_tokenizer.build()
    vision, language = (
        SIZES["1b"].vision,
        dataclasses.replace(SIZES["1b"].language, vocab_size=settings.vocabulary),
    )
    if settings.layers:
        vision, language = (
            dataclasses.replace(part, num_layers=settings.layers) for part in (vision, language)
        )
    # The released tokenizer is not in this repository. Another one changes the number of the visual
    # token and nothing else.
    model = ModelConfig(
        vision, language, image_token_id=json.loads(files["added_tokens.json"])["<IMG_CONTEXT>"]
    )
    config = to_hf(model, None, "hf", "float32")
    for name, content in (files | {"config.json": json.dumps(config).encode()}).items():
        (directory / name).write_bytes(content)
    with torch.device("meta"):
        shapes = InternVLForConditionalGeneration(InternVLConfig.from_dict(config)).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: random_tensor(name, tensor.shape, generator) for name, tensor in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return {"parameters": sum(tensor.numel() for tensor in tensors.values())}


def random_tensor(name: str, shape, generator):
    """Norms 1 (and their biases small), layer scales 0.1, the rest normal with deviation 0.02;
    never zeros, which flatter.
    """
    import torch

    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape)
    if "lambda_" in name:
        return torch.full(shape, 0.1)
    return torch.randn(shape, generator=generator).mul_(0.02)


def make_inputs(
    image_token_id: int, visual_tokens: int, size: int, vocabulary: int
) -> tuple[np.ndarray, ...]:
    """Returns (ids with an image i32[T], ids without one i32[T], tile u8[1,S,S,3]); T is the same
    for both.
    """
    rng = np.random.default_rng(0)
    text = rng.integers(image_token_id + 100, vocabulary, visual_tokens + TEXT_TOKENS).astype(
        np.int32
    )
    with_image = text.copy()
    with_image[4 : 4 + visual_tokens] = image_token_id
    return with_image, text, rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)


def measure_jax(directory: pathlib.Path, settings: Settings) -> dict:
    import jax

    from internvl3_jax import load
    from internvl3_jax.config import UNITS
    from internvl3_jax.data.batch import Prompt
    from internvl3_jax.inference.generation_config import GenerationConfig
    from internvl3_jax.inference.generator import Generator
    from internvl3_jax.inference.programs import encode_tiles
    from internvl3_jax.inference.sampling import Sampling

    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    began = time.perf_counter()
    checkpoint = load(directory, dtype="float32")
    config = checkpoint.config
    generator = Generator(config, checkpoint.take_params(donate=True), donate=True)
    load_seconds = time.perf_counter() - began

    ids, text, tile = make_inputs(
        config.image_token_id, config.tokens_per_tile, config.vision.image_size, settings.vocabulary
    )
    positions = np.arange(len(ids), dtype=np.int32) * UNITS
    image_prompt = Prompt(ids, positions, [(4, config.tokens_per_tile)], [tile])
    run = GenerationConfig(1 + settings.tokens, Sampling(), (0,), config.language.rope_scaling)

    def vision():
        began = time.perf_counter()
        encode_tiles(generator.model, generator.vision_params, tile).block_until_ready()
        return {"vision": time.perf_counter() - began}

    def prefill():
        began = time.perf_counter()
        generator.start([Prompt(text, positions, [], [])], run).token.block_until_ready()
        return {"prefill": time.perf_counter() - began}

    def answer():
        times, tokens = [time.perf_counter()], []
        for (piece,) in generator.stream(generator.start([image_prompt], run), run):
            times.append(time.perf_counter())
            tokens += piece
        return {
            "first_token": times[1] - times[0],
            "decode": (times[-1] - times[1]) / settings.tokens,
            "tokens": tokens,
        }

    result = timed({"vision": vision, "prefill": prefill, "answer": answer}, settings)
    ones = np.ones_like(ids)[None]
    batch = {
        "tokens": ids[None],
        "positions": positions[None],
        "segments": ones,
        "tiles": tile[None],
    }
    logits = jax.jit(generator.model.apply)({"params": generator.params}, batch)
    np.save(directory / "jax.npy", np.asarray(logits)[0, -LOGITS_KEPT:])
    versions = {"jax": jax.__version__}
    return {"load_seconds": load_seconds, "versions": versions} | result


def measure_torch(directory: pathlib.Path, settings: Settings) -> dict:
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    began = time.perf_counter()
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    load_seconds = time.perf_counter() - began

    config = model.config
    size = config.vision_config.image_size[0]
    ids, text, tile = make_inputs(
        config.image_token_id, config.image_seq_length, size, settings.vocabulary
    )
    ids, text = (torch.from_numpy(tokens.astype(np.int64))[None] for tokens in (ids, text))
    mean, std = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
    pixels = (
        torch.from_numpy((tile.astype(np.float32) / 255 - mean) / std)
        .permute(0, 3, 1, 2)
        .contiguous()
    )

    def vision():
        began = time.perf_counter()
        model.model.get_image_features(pixel_values=pixels)
        return {"vision": time.perf_counter() - began}

    def prefill():
        began = time.perf_counter()
        model(input_ids=text, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
        return {"prefill": time.perf_counter() - began}

    class Times:
        """A streamer: generate() hands it the prompt, then every token as soon as it is drawn."""

        def put(self, tokens):
            self.values.append(time.perf_counter())

        def end(self):
            pass

    def answer(cache: str, **more):
        times = Times()
        times.values = []
        began = time.perf_counter()
        # Drawn to the end, as on our side: no id stops it.
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=1 + settings.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=times,
            **more,
        )
        first, last = times.values[1], times.values[-1]
        return {
            f"first_token_{cache}": first - began,
            f"decode_{cache}": (last - first) / settings.tokens,
            f"tokens_{cache}": out[0, ids.shape[1] :].tolist(),
        }

    cases = {
        "vision": vision,
        "prefill": prefill,
        "dynamic": lambda: answer("dynamic"),
        "static": lambda: answer("static", cache_implementation="static", disable_compile=True),
    }
    with torch.inference_mode():
        result = timed(cases, settings)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        np.save(
            directory / "torch.npy", model(**batch, logits_to_keep=LOGITS_KEPT).logits[0].numpy()
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"load_seconds": load_seconds, "versions": versions} | result


def timed(cases: dict, settings: Settings) -> dict:
    """Runs every case once to warm up (and compile), then `repeats` times; seconds and tokens by
    name, and the peak memory.
    """
    began = time.perf_counter()
    for case in cases.values():
        case()
    warm_up, start_peak, measured = time.perf_counter() - began, peak_bytes(), {}
    reset_peak()
    for case in cases.values():
        for _ in range(settings.repeats):
            for name, value in case().items():
                measured.setdefault(name, []).append(value)
    tokens = {name: values[-1] for name, values in measured.items() if name.startswith("tokens")}
    seconds = {name: values for name, values in measured.items() if name not in tokens}
    peaks = {"start_peak": start_peak, "steady_peak": peak_bytes()}
    return {"warm_up_seconds": warm_up, **peaks, "seconds": seconds, "tokens": tokens}


def peak_bytes() -> int:
    """Returns the most memory that this process has held since its start or `reset_peak`, pages of
    mapped files included.
    """
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


if __name__ == "__main__":
    main()
