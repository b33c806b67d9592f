"""The engine's side of the device: parameters, the cache of all rows, and calls of the programs."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference import programs as model_programs
from internvl3_jax.inference.engine import programs, prompt_programs
from internvl3_jax.inference.engine.adapter_stack import stacked
from internvl3_jax.inference.engine.image_store import EncodedTiles, Features
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.engine.row_sampling import NO_TOKEN, RowSettings
from internvl3_jax.inference.engine.rows import is_stretched
from internvl3_jax.inference.engine.sizes import FixedSizes, GrowingSizes
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model import kv_cache, lora
from internvl3_jax.positions import next_position

# Tokens of a chunk of a prompt: few sizes, each of which is compiled. CPU or accelerator.
CHUNKS = {True: (64, 256), False: (64, 256, 1024)}
# Tiles that are encoded in one call. CPU or accelerator.
TILES = {True: (8, 4, 2, 1), False: (16, 8, 4, 2, 1)}


class Device:
    """Calls the programs on the parameters of a `Generator`.

    Args:
      capacity: slots of each row.
      grows: whether `grow` may be called.

    Attributes:
      settings: of the rows, on the host; call `settings_changed` after a change.
    """

    def __init__(self, generator: Generator, rows: int, capacity: int, grows: bool):
        self.generator, self.config = generator, generator.config
        self.model, self.dtype = generator.model, generator.dtype
        self.on_cpu = model_programs.on_cpu()
        self.sizes = GrowingSizes(capacity) if grows else FixedSizes(CHUNKS[self.on_cpu], capacity)
        self.rows = rows
        self.settings = RowSettings.empty(rows)
        self._sent_settings: RowSettings | None = None
        self.vocabulary = self.config.language.padded_vocab_size
        self._no_bias = np.zeros(self.vocabulary, np.float32)
        self._no_tokens = np.zeros(self.vocabulary, bool)
        self._load_adapters()
        with self.generator.mesh_context():
            self.state = programs.first_state(rows, self.vocabulary)
            self.cache = self._empty_cache(rows, capacity)

    # --- parameters -------------------------------------------------------------------------------

    def _load_adapters(self) -> None:
        generator = self.generator
        named = generator.adapters
        self.numbers = {None: 0} | {name: number for number, name in enumerate(named, 1)}
        trees = [parts.get(lora.SUBTREE, {}).get("language", {}) for parts in named.values()]
        stack = stacked(trees)
        if generator.mesh is not None:
            replicated = jax.NamedSharding(generator.mesh, jax.P())
            stack = jax.device_put(stack, replicated)
        adapters = {lora.SUBTREE: {"language": stack}} if stack else {}
        # Decoders that differ from the base in whole parameters: their requests run by themselves.
        self.groups = {
            name: {"language": parts["language"]} | adapters
            for name, parts in named.items()
            if "language" in parts
        }
        self._base = {"language": generator.base["language"]} | adapters
        self._vision = {None: _vision_part(generator.base)}
        for name, parts in named.items():
            own = _vision_part(parts)
            if own:
                self._vision[name] = self._vision[None] | own

    def params_of(self, group: str | None) -> dict:
        """Returns the decoder's parameters. group: an adapter of `self.groups`, or None."""
        return self._base if group is None else self.groups[group]

    def vision_of(self, adapter: str | None) -> str | None:
        """Returns whose vision tower and projector an adapter uses: its own, or the base's."""
        return adapter if adapter in self._vision else None

    # --- prompts ----------------------------------------------------------------------------------

    def encode(self, tiles: UInt8[np.ndarray, "m S S 3"], adapter: str | None) -> EncodedTiles:
        """Returns the features of tiles, whose number is one of `TILES`."""
        params = self._vision[self.vision_of(adapter)]
        with self._calling("vision tower", len(tiles), self.vision_of(adapter)):
            if self.config.flash:
                return EncodedTiles(*model_programs.encode_both(self.model, params, tiles))
            return EncodedTiles(model_programs.encode_tiles(self.model, params, tiles))

    def pieces(self, count: int) -> list[int]:
        """Returns sizes of `TILES` that add up to a number of tiles."""
        sizes = []
        for size in TILES[self.on_cpu]:
            sizes += [size] * (count // size)
            count %= size
        return sizes

    def no_features(self, slots: int) -> Float[Array, "1 R D"]:
        """Returns the features of a prompt before any tile is written."""
        with self.generator.mesh_context():
            width = self.config.language.hidden_size
            return model_programs.zero_features(1, slots, width, self.dtype)

    def write_features(
        self,
        visual: Float[Array, "1 R D"],
        features: Features,
        column: int,
        compressed: Bool[np.ndarray, " n"] | None = None,
    ) -> Float[Array, "1 R D"]:
        """Writes the tiles of an image from a column on.

        Args:
          visual: is donated.
          compressed: which tiles are; None: none.
        """
        places = [(piece, tile) for piece in features for tile in range(piece.tiles)]
        with self.generator.mesh_context():
            for number, (piece, tile) in enumerate(places):
                is_compressed = compressed is not None and compressed[number]
                tokens = piece.compressed if is_compressed else piece.full
                visual = prompt_programs.write_tile(
                    visual, tokens, np.int32(tile), np.int32(column)
                )
                column += tokens.shape[1]
        return visual

    def prompt_cache(self, slots: int, source: int | None) -> kv_cache.Cache:
        """Returns a cache of one row: empty, or with the beginning of a row."""
        with self.generator.mesh_context():
            if source is None:
                return self._empty_cache(1, slots)
            return jax.tree.map(
                lambda x: prompt_programs.take_row(x, np.int32(source), slots), self.cache
            )

    def run_chunk(
        self,
        request: Request,
        group: str | None,
        start: int,
        size: int,
        visual: Float[Array, "1 R D"],
        cache: kv_cache.Cache,
    ) -> tuple[Float[Array, "1 1 D"], kv_cache.Cache]:
        """Runs tokens of a prompt from `start` on; at most `size`, padding included."""
        prompt = request.prompt
        count = min(size, len(prompt.tokens) - start)
        tokens, positions = np.zeros((2, 1, size), np.int32)
        tokens[0, :count] = prompt.tokens[start : start + count]
        positions[0, :count] = prompt.positions[start : start + count]
        positions[0, count:] = positions[0, count - 1]
        highest = int(prompt.positions.max())
        scalars = {
            "start": np.int32(start),
            "last": np.int32(count - 1),
            "adapter": np.int32(self.numbers[request.adapter]),
            "rope": np.int32(highest if is_stretched(request, self.config.language) else 0),
        }
        with self._calling("prefill", start == 0, size, kv_cache.num_slots(cache)):
            return prompt_programs.run_chunk(
                self.model,
                start == 0,
                self.params_of(group),
                tokens,
                visual,
                positions,
                scalars,
                cache,
            )

    # --- rows -------------------------------------------------------------------------------------

    def settings_changed(self) -> None:
        """Sends the settings to the device before the next call."""
        self._sent_settings = None

    def start_row(
        self,
        row: int,
        request: Request,
        group: str | None,
        hidden: Float[Array, "1 1 D"],
        cache: kv_cache.Cache,
        bias: Float[np.ndarray, " V"] | None,
    ) -> programs.Block:
        """Puts a prompt that has been run into a row and samples the first token of its answer."""
        self._set(row, request, bias is not None)
        prompt = request.prompt
        in_prompt = self._no_tokens
        if request.sampling.repetition_penalty != 1:
            in_prompt = np.zeros_like(self._no_tokens)
            in_prompt[prompt.tokens] = True
        scalars = {
            "row": np.int32(row),
            "position": np.int32(next_position(prompt.positions)),
            "slot": np.int32(len(prompt.tokens)),
        }
        with self._calling("first token"):
            self.cache = prompt_programs.insert_row(self.cache, cache, np.int32(row))
            block, self.state = programs.start_row(
                self.model,
                self.params_of(group),
                self.state,
                self._settings_to_send(),
                hidden,
                scalars,
                in_prompt,
                self._no_bias if bias is None else bias,
            )
        return block

    def _set(self, row: int, request: Request, has_bias: bool) -> None:
        settings, sampling = self.settings, request.sampling
        settings.temperature[row] = sampling.temperature
        settings.top_p[row], settings.top_k[row] = sampling.top_p, sampling.top_k
        settings.min_p[row], settings.seed[row] = sampling.min_p, sampling.seed
        settings.repetition[row] = sampling.repetition_penalty
        settings.presence[row] = sampling.presence_penalty
        settings.frequency[row] = sampling.frequency_penalty
        settings.limit[row] = request.max_new_tokens
        settings.stop_ids[row] = NO_TOKEN
        settings.stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        settings.is_dynamic[row] = request.scaling == "dynamic"
        settings.adapter[row] = self.numbers[request.adapter]
        settings.is_live[row] = True
        settings.has_bias[row] = has_bias
        settings.has_logprobs[row] = request.top_logprobs is not None
        self.settings_changed()

    def free_row(self, row: int) -> None:
        """Takes a row out of the blocks to come."""
        self.settings.is_live[row] = False
        self.settings_changed()

    def clear_row(self, row: int) -> None:
        """Zeroes the cache of a row whose numbers are not finite: a masked NaN still spreads."""
        empty = self.prompt_cache(self.sizes.capacity, None)
        with self.generator.mesh_context():
            self.cache = prompt_programs.insert_row(self.cache, empty, np.int32(row))

    def set_bias(self, row: int, bias: Float[np.ndarray, " V"]) -> None:
        """Replaces what is added to the logits of a row."""
        histories = self.state.histories
        with self.generator.mesh_context():
            new = programs.set_bias(histories.bias, np.int32(row), bias)
        self.state.histories = dataclasses.replace(histories, bias=new)

    def decode(self, group: str | None, count: int, slots: int, until_free: bool) -> programs.Block:
        """Starts a block of tokens. slots: of the live rows at its end. until_free: as of
        `programs.decode_block`.
        """
        is_plain = not self.on_cpu and self.settings.is_plain()
        num_read = self.sizes.for_reading(slots)
        with self._calling("decode", is_plain, num_read, self.sizes.capacity):
            block, self.state, self.cache = programs.decode_block(
                self.model,
                is_plain,
                num_read,
                self.params_of(group),
                self.state,
                self.cache,
                self._settings_to_send(),
                np.int32(count),
                np.bool_(until_free),
            )
        return block

    def grow(self, capacity: int) -> None:
        """Makes the rows longer."""
        with self.generator.mesh_context():
            for layer in self.cache:
                for name in layer:
                    layer[name] = prompt_programs.grow(layer[name], capacity)
        self.sizes = GrowingSizes(capacity)

    # --- all programs -----------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Calls every program once, so that no request compiles one. No row may be in use."""
        size = self.config.vision.image_size
        for adapter in self._vision:
            for count in TILES[self.on_cpu]:
                tiles = np.zeros((count, size, size, 3), np.uint8)
                piece = self.encode(tiles, adapter)
                few = np.ones(count, bool) if self.config.flash else None
                for slots in self.sizes.prompt_slots:
                    if slots >= count * piece.full.shape[1]:
                        self.write_features(self.no_features(slots), [piece], 0)
                    if few is not None and slots >= count * piece.compressed.shape[1]:
                        self.write_features(self.no_features(slots), [piece], 0, few)
        for is_start, chunk, slots in sorted(self.sizes.programs()):
            start = 0 if is_start else slots - chunk
            tokens = np.zeros(start + chunk, np.int32)
            positions = UNITS * np.arange(len(tokens), dtype=np.int32)
            request = Request(Prompt(tokens, positions, [], []), max_new_tokens=1)
            cache = self.prompt_cache(slots, None if is_start else 0)
            hidden, cache = self.run_chunk(
                request, None, start, chunk, self.no_features(slots), cache
            )
            self.start_row(0, request, None, hidden, cache, None)
        self.set_bias(0, self._no_bias)
        self.clear_row(0)
        for slots in self.sizes.read_slots:
            for temperature in (0.0, 1.0):
                self.settings = RowSettings.empty(self.rows)
                self.settings.is_live[0], self.settings.limit[0] = True, 1
                self.settings.temperature[0] = temperature
                self.settings_changed()
                self.decode(None, 1, slots, until_free=False)
        self.settings = RowSettings.empty(self.rows)
        self.settings_changed()
        jax.block_until_ready(self.cache)

    def _empty_cache(self, rows: int, slots: int) -> kv_cache.Cache:
        generator = self.generator
        return model_programs.init_cache(self.config.language, rows, slots, generator.cache_dtype)

    def _settings_to_send(self) -> RowSettings:
        if self._sent_settings is None:
            # A CPU's programs share the memory of these copies; an accelerator keeps its own.
            copies = jax.tree.map(np.copy, self.settings)
            self._sent_settings = copies if self.on_cpu else jax.device_put(copies)
        return self._sent_settings

    def _calling(self, program: str, *key):
        return self.generator.calling(program, "engine", self.rows, *key)


def _vision_part(params: dict) -> dict:
    """Returns what the vision tower and the projector of a tree are made of."""
    part = {name: params[name] for name in ("vision", "projector", "flash") if name in params}
    adapters = {
        name: tree for name, tree in params.get(lora.SUBTREE, {}).items() if name != "language"
    }
    return part | ({lora.SUBTREE: adapters} if adapters else {})
