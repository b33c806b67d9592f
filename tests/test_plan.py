"""The plan of a prompt: what fits is as large as it can be, and what was given is kept."""

import dataclasses

import numpy as np
import pytest

from internvl3_jax.config import UNITS, LanguageConfig, ProcessorConfig
from internvl3_jax.data.media.inputs import OpenedDocument, OpenedImage, OpenedVideo
from internvl3_jax.data.media.tiles import count_tiles
from internvl3_jax.data.plan import FEWEST_FRAMES, PlanError, Room, plan_prompt
from internvl3_jax.positions import DELTAS

PROCESSOR = ProcessorConfig()
LANGUAGE = LanguageConfig(100, 8, 1, 1, 1, 8, 8, rope_scaling="dynamic", rope_factor=2.0)
LABEL = 6  # tokens of a label, in these tests


class FakeVideo(OpenedVideo):
    """A video of so many frames, one tile each, without a file."""

    def __init__(self, frames, is_fixed=False):
        self.frames, self.is_fixed = frames, is_fixed
        self.footage = dataclasses.make_dataclass("Footage", ["total"])(1000)
        self.video = dataclasses.make_dataclass("Video", ["tiles"])(1)


class FakeDocument(OpenedDocument):
    """Pages of one size, in pixels at any number of tiles."""

    def __init__(self, pages, size=(1600, 1200)):
        self.pdf = dataclasses.make_dataclass("Pdf", ["pages"])(list(range(1, pages + 1)))
        self.size = size

    def page_pixels(self, processor, max_tiles):
        return [self.size] * len(self.pdf.pages)


def room(inputs, text=50, new=100, max_tokens=None, language=LANGUAGE, earlier=()):
    def measure(frames):
        images = sum(len(item.tiles(PROCESSOR, 1, frames)) for item in inputs)
        total = text + images * (LABEL + 2 + PROCESSOR.tokens_per_tile)
        return total, total

    return Room(language, new, max_tokens, earlier, measure)


def cost(inputs, frames, limit, delta, text=50, new=100):
    """(tokens, last position), summed image by image."""
    tokens = position = text
    for item in inputs:
        for tiles in item.tiles(PROCESSOR, limit, frames):
            visual = tiles * PROCESSOR.tokens_per_tile
            tokens += LABEL + 2 + visual
            position += LABEL + 2 + int(np.ceil(visual * delta / UNITS))
    return tokens, position + new


def known(delta):
    return 65536 if delta == UNITS else 32768  # V2PE switches dynamic NTK off


def test_what_fits_is_as_the_official_code_has_it():
    inputs = [OpenedImage(size=(1600, 1200)), FakeVideo(32), FakeDocument(3)]
    choice = plan_prompt(inputs, PROCESSOR, room(inputs))
    assert (choice.frames, choice.max_tiles, choice.deltas) == (32, 12, [UNITS] * 3)
    plan = choice.plan
    assert (plan.frames, plan.pages, plan.delta) == (((32, 1000),), ((1, 2, 3),), "1")
    assert plan.changed == () and (plan.tokens, plan.position) == cost(inputs, 32, 12, UNITS)
    assert plan.line() == (
        "32 of 1000 frames of the video, 3 pages of the document, at most 12 tiles an image, "
        f"delta 1: {plan.tokens:,} tokens, the answer up to position {plan.position:,} of 65,536"
    )


@pytest.mark.parametrize("pages", [15, 25, 40, 90])
def test_the_delta_gives_way_first_and_no_more_than_it_must(pages):
    inputs = [FakeDocument(pages)]
    choice = plan_prompt(inputs, PROCESSOR, room(inputs))
    (delta,) = choice.deltas
    fitting = [d for d in DELTAS if cost(inputs, 0, 12, d)[1] <= known(d)]
    assert choice.max_tiles == 12 and delta == max(fitting)
    assert choice.plan.changed == (() if delta == UNITS else ("delta",))
    assert choice.plan.max_position == known(delta)


@pytest.mark.parametrize("most", [4_000, 12_000, 30_000])
def test_a_cache_budget_takes_tiles_and_then_frames(most):
    inputs = [FakeDocument(4), FakeVideo(32)]
    choice = plan_prompt(inputs, PROCESSOR, room(inputs, max_tokens=most))
    tokens, _ = cost(inputs, choice.frames, choice.max_tiles, choice.deltas[0])
    assert tokens <= most and choice.plan.tokens == tokens and choice.plan.max_tokens == most
    if choice.frames < 32:
        assert tokens == cost(inputs, choice.frames, 1, 1)[0]
        assert cost(inputs, choice.frames + 1, 1, 1)[0] > most
    if choice.max_tiles < 12:
        assert cost(inputs, choice.frames, choice.max_tiles + 1, 1)[0] > most
    assert choice.deltas == [UNITS] * 2  # it takes no memory


def test_what_was_given_is_kept_or_refused():
    inputs = [FakeDocument(30)]
    tokens = cost(inputs, 0, 12, UNITS)[0]
    assert tokens > 65536
    kept = plan_prompt(inputs, PROCESSOR, room(inputs), max_tiles=12)
    assert kept.max_tiles == 12 and kept.plan.changed == ("delta",)
    kept = plan_prompt(inputs, PROCESSOR, room(inputs), deltas=[UNITS])
    assert kept.deltas == [UNITS] and kept.plan.changed == ("tiles",)
    with pytest.raises(PlanError, match=f"at the least it has {tokens:,} tokens.*knows 65,536"):
        plan_prompt(inputs, PROCESSOR, room(inputs), 12, [UNITS])
    video = [FakeVideo(200, is_fixed=True)]
    with pytest.raises(PlanError, match=r"the cache has room for 9,000.*fewer frames"):
        plan_prompt(video, PROCESSOR, room(video, max_tokens=9000))
    video = [FakeVideo(32)]
    few = (FEWEST_FRAMES * (LABEL + 2 + 256)) + 50
    choice = plan_prompt(video, PROCESSOR, room(video, max_tokens=few))
    assert choice.frames == FEWEST_FRAMES and choice.plan.max_tiles is None
    with pytest.raises(PlanError, match="at the least with 8 frames"):
        plan_prompt(video, PROCESSOR, room(video, max_tokens=few - 1))


def test_a_long_text_stays_where_only_the_dynamic_scaling_knows_its_positions():
    """A smaller delta would switch that scaling off."""
    inputs = [FakeVideo(8)]
    choice = plan_prompt(inputs, PROCESSOR, room(inputs, text=40_000))
    assert choice.deltas == [UNITS] and choice.plan.max_position == 65536
    with pytest.raises(PlanError, match="knows 32,768"):
        plan_prompt(inputs, PROCESSOR, room(inputs, text=40_000, earlier=[64]))


def test_random_plans_fit_and_are_the_largest_in_order():
    """Against trying everything: the most frames, then the most tiles, then the largest delta."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        inputs = [OpenedImage(size=tuple(map(int, rng.integers(100, 3000, 2))))]
        inputs += [FakeVideo(int(rng.integers(1, 40)))] * int(rng.integers(0, 3))
        inputs += [FakeDocument(int(rng.integers(1, 20)))] * int(rng.integers(0, 2))
        small = dataclasses.replace(LANGUAGE, max_position=int(rng.integers(1500, 9000)))
        most = int(rng.integers(3000, 20000)) if rng.random() < 0.7 else None
        place = room(inputs, max_tokens=most, language=small)
        open_frames = max((item.frames for item in inputs if hasattr(item, "footage")), default=1)

        def fits(frames, limit, delta, inputs=inputs, small=small, most=most):
            tokens, position = cost(inputs, frames, limit, delta)
            factor = 2 if delta == UNITS else 1
            return position <= factor * small.max_position and (most is None or tokens <= most)

        possible = [
            (frames, limit, delta)
            for frames in range(min(FEWEST_FRAMES, open_frames), open_frames + 1)
            for limit in range(1, 13)
            for delta in DELTAS
            if fits(frames, limit, delta)
        ]
        if not possible:
            with pytest.raises(PlanError):
                plan_prompt(inputs, PROCESSOR, place)
            continue
        choice = plan_prompt(inputs, PROCESSOR, place)
        found = choice.frames, choice.max_tiles, choice.deltas[0]
        counts = [len(item.tiles(PROCESSOR, found[1], found[0])) for item in inputs]
        assert fits(*found) and counts
        assert found == max(possible), (found, max(possible))


def test_tiles_of_images_by_the_rule():
    image = OpenedImage(size=(1600, 1200))
    assert image.tiles(PROCESSOR, 6, 0) == [count_tiles(1600, 1200, PROCESSOR, 6)]
