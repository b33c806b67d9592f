"""The stream of samples: the same for any number of workers, resumed exactly, and no sample lost in
silence.
"""

import itertools
import json
import pickle

import numpy as np
import pytest

from internvl3_jax.config import UNITS, DataConfig
from internvl3_jax.data.batch import SampleError, average_weights
from internvl3_jax.data.media.augment import recompress
from internvl3_jax.data.pipeline import mix, sample_dataset, sample_stream, source_names
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.mixture import Selection
from internvl3_jax.data.text.chat_template import encode_chat
from internvl3_jax.data.truncation import NothingTrained, TooLong, encode_within
from tests.support.official_data import (
    PROCESSOR,
    make_image,
    make_sample,
    tokenizer,
    turns,
    write_meta,
    write_video,
)
from tests.support.sample_stream import make, take

SCALARS = ("source", "row", "index")
TEXT = {"conversations": turns("hi", "ho")}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three sources: images with recompression, one or two a row; a video; text."""
    folder = tmp_path_factory.mktemp("mixture")
    for number in range(6):
        make_image(20 + 15 * number, 30, seed=number).save(folder / f"{number}.png")
    write_video(folder / "a.mp4", 20)
    one = [
        {"image": f"{number}.png", "conversations": turns(f"What is {number}?", "That")}
        for number in range(6)
    ]
    two = [
        {
            "image": ["0.png", "5.png"],
            "conversations": turns("<image><image> Which?", "This", "And?", "That"),
        }
    ]
    video = [
        {"video": "a.mp4", "clip": [0, 1.5], "conversations": turns("<video>\nWhat moves?", "That")}
    ]
    text = [{"conversations": turns(f"{number}?", "Yes")} for number in range(4)]
    return write_meta(
        folder,
        images={"rows": one + two, "data_augment": True, "max_dynamic_patch": 3},
        videos={"rows": video, "data_augment": True, "repeat_time": 3},
        text={"rows": text},
    )


def assert_equal(samples, others):
    assert len(samples) == len(others)
    for one, other in zip(samples, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_any_number_of_workers_gives_the_same_stream(mixture):
    dataset = make(mixture, text_fraction=0.25)
    samples = take(dataset, 24)
    assert {sample["source"] for sample in samples} == {0, 1, 2} and [
        s["index"] for s in samples
    ] == list(range(24))
    for workers in (1, 2):
        found = take(dataset, 24, workers)
        assert_equal(samples, found)
        # None of them keeps the memory that it came in, which is shared with the worker and behind
        # an open file each.
        assert {
            type(value)
            for sample in found
            for value in sample.values()
            if isinstance(value, np.ndarray)
        } == {np.ndarray}
    # Each can be made again by its number, also by a copy as a worker has it.
    copy = pickle.loads(pickle.dumps(dataset))
    assert_equal(samples[5:9], [copy[sample["index"]] for sample in samples[5:9]])
    # Shards share out the samples, whatever their number.
    shards = [take(dataset, 8, shard=shard, shards=3) for shard in range(3)]
    assert_equal(samples, [shards[number % 3][number // 3] for number in range(24)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_from_its_json(mixture, workers):
    dataset = make(mixture)
    iterator, again = (iter(sample_stream(dataset, 1, 2, workers)) for _ in range(2))
    list(itertools.islice(iterator, 7))
    state = json.loads(json.dumps(iterator.get_state()))
    again.set_state(state)
    assert_equal(list(itertools.islice(iterator, 9)), list(itertools.islice(again, 9)))
    iterator.close()
    again.close()


def test_samples_differ_from_epoch_to_epoch_and_follow_their_rules(mixture):
    samples = take(make(mixture), 120)
    frames = {len(sample["tiles"]) for sample in samples if sample["source"] == 1}
    assert frames == {2, 3, 4}
    same = [s for s in samples if (s["source"], s["row"]) == (0, 5)]
    assert len({s["tiles"].tobytes() for s in same}) == len(same) > 3  # recompressed anew
    assert {len(s["tiles"]) for s in same} == {4}  # 95 x 30 pixels: three tiles and the thumbnail
    # 3 // 2 tiles for either image
    assert {len(s["tiles"]) for s in samples if (s["source"], s["row"]) == (0, 6)} == {2}
    steps = {step for s in samples for step in np.diff(s["positions"]).tolist() if step < UNITS}
    assert steps == {UNITS // 2, UNITS // 4}
    for sample in samples:
        assert (sample["tokens"] == tokenizer().token_id("<IMG_CONTEXT>")).sum() == 4 * len(
            sample["tiles"]
        )


def test_every_epoch_has_every_row_in_its_own_order(mixture):
    dataset = make(mixture)
    for source, rows in ((0, 7), (2, 4)):
        order = [s["row"] for s in (dataset[index] for index in range(60)) if s["source"] == source]
        first, second = order[:rows], order[rows : 2 * rows]
        assert sorted(first) != first or sorted(second) != second
    single = mix([Selection(0, 50, 1.0)], [1.0], seed=1)
    epochs = [[single[50 * epoch + index][1] for index in range(50)] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs) and epochs[0] != epochs[1]


def test_recompression():
    tiles = np.stack([np.asarray(make_image(16, 16, seed)) for seed in range(200)])
    changed = recompress(tiles, np.random.default_rng(0))
    assert changed.dtype == np.uint8 and changed.shape == tiles.shape
    errors = np.abs(changed.astype(int) - tiles).mean(axis=(1, 2, 3))
    assert errors.min() > 0.1 and len(set(errors)) > 190  # a quality of its own for each tile
    np.testing.assert_array_equal(changed, recompress(tiles, np.random.default_rng(0)))


# --- samples that cannot be used, and long ones --------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_training(tmp_path, workers):
    meta = write_meta(
        tmp_path, good={"rows": [TEXT] * 3}, bad={"rows": [TEXT, {"image": "gone.png", **TEXT}]}
    )
    with pytest.raises(
        SampleError, match=r"^bad row 1 \(bad.jsonl line 2\): .*gone.png: no such file"
    ):
        take(make(meta), 50, workers)


def test_a_bad_sample_is_marked_where_it_may_be_skipped(tmp_path):
    meta = write_meta(
        tmp_path, good={"rows": [TEXT] * 3}, bad={"rows": [TEXT, {"image": "gone.png", **TEXT}]}
    )
    samples = take(make(meta, on_bad_sample="skip"), 50)
    marked = [sample for sample in samples if "error" in sample]
    assert 3 < len(marked) < 25 and all(
        (m["source"], m["row"]) == (1, 1) and "gone.png" in m["error"] for m in marked
    )
    assert [sample["index"] for sample in samples] == list(range(50))


LONG = [
    {"role": role, "content": content}
    for turn in range(6)
    for role, content in (
        ("user", "<image>\nWhat?" if turn % 2 == 0 else "And?"),
        ("assistant", f"That is number {turn}"),
    )
]


def encode_long(messages, tiles):
    return encode_chat(messages, tiles, tokenizer(), PROCESSOR, add_generation_prompt=False)


def test_truncation_keeps_whole_turns_and_whole_images():
    whole = encode_long(LONG, [3, 1, 2])
    lengths = [
        len(encode_long(LONG[: 2 * n], [3, 1, 2][: (n + 1) // 2]).tokens) for n in range(1, 7)
    ]
    for limit in range(min(lengths), len(whole.tokens) + 1):
        encoded, kept = encode_within(LONG, [3, 1, 2], encode_long, limit, 99, "truncate")
        turns_kept = sum(length <= limit for length in lengths)
        assert (
            len(encoded.tokens) == lengths[turns_kept - 1]
            and kept == len(encoded.runs) == (turns_kept + 1) // 2
        )
        np.testing.assert_array_equal(encoded.tokens, whole.tokens[: len(encoded.tokens)])
    for tiles, images in ((6, 3), (5, 2), (4, 2), (3, 1)):
        assert encode_within(LONG, [3, 1, 2], encode_long, 999, tiles, "truncate")[1] == images
    with pytest.raises(TooLong, match="its first answer alone does not fit"):
        encode_within(LONG, [3, 1, 2], encode_long, min(lengths) - 1, 99, "truncate")
    with pytest.raises(
        TooLong, match=r"6 tiles, a row holds 5: raise data.tiles_per_row \(set data.overlong"
    ):
        encode_within(LONG, [3, 1, 2], encode_long, 999, 5, "error")
    with pytest.raises(NothingTrained, match="nothing to learn"):
        encode_within(LONG[:1], [3], encode_long, 999, 5, "truncate")


def test_overlong_samples_in_the_stream(tmp_path):
    make_image(16, 16).save(tmp_path / "a.png")
    rows = [
        TEXT,
        {
            "image": "a.png",
            "conversations": turns("hi", "ho", "<image>\nWhat is " + "this " * 30, "That"),
        },
    ]
    meta = write_meta(tmp_path, a={"rows": rows})
    with pytest.raises(SampleError, match=r"a row 1 .*tokens, a row holds 30"):
        take(make(meta, tokens_per_row=30), 4)
    dropped = [
        sample
        for sample in take(make(meta, tokens_per_row=30, overlong="drop"), 4)
        if "error" in sample
    ]
    assert [marker["row"] for marker in dropped] == [1, 1]
    short = [
        s for s in take(make(meta, tokens_per_row=30, overlong="truncate"), 4) if s["row"] == 1
    ]
    assert len(short) == 2 and all(len(s["tiles"]) == 0 and len(s["tokens"]) <= 30 for s in short)


def test_loss_averages():
    trained = np.array([False, True, True, False, True, True])
    for average, weight in (("token", 1.0), ("sample", 0.25), ("square", 0.5)):
        np.testing.assert_array_equal(
            average_weights(trained, average), trained * np.float32(weight)
        )
    assert not average_weights(np.zeros(3, bool), "sample").any()


def test_the_digits_come_through_the_same_functions():
    config = DataConfig(
        source="examples.tiny_digits.recipe.data:sources",
        samples=50,
        tokens_per_row=256,
        tiles_per_row=16,
    )
    dataset = sample_dataset(config, PROCESSOR, tokenizer())
    samples = take(dataset, 60)
    assert source_names(config) == ["digits"]
    assert [tuple(s[name] for name in SCALARS) for s in samples] == [
        (0, number % 50, number) for number in range(60)
    ]
    question = open_sources(config)[0].questions[7]
    deltas = [UNITS] * len(question.images)
    expected = make_sample(question.messages, question.images, tokenizer(), PROCESSOR, deltas)
    assert_equal(
        [expected], [{name: value for name, value in samples[7].items() if name not in SCALARS}]
    )
