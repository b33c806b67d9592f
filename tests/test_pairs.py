"""Pairs of answers: as a sample, in a row, and what the train step makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.config import EvalConfig, LossConfig, OptimizerConfig
from internvl3_jax.data.batch import SampleError
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.pipeline import make_tokenizer
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.training import mpo
from internvl3_jax.training.evaluation import Evaluator
from internvl3_jax.training.losses import cross_entropy
from internvl3_jax.training.objective import MpoLoss
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import TrainState, train_step
from tests.support.official_data import write_meta, write_video
from tests.support.pairs import LOSS, PAIRS, pairs_config
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, random_params, train_config
from tests.support.train_step import by_path

MODEL, PARAMS, OTHER = InternVL(CONFIG), random_params(CONFIG), random_params(CONFIG, seed=1)
GRADIENT = make_optimizer(OptimizerConfig(warmup_steps=0), 100)._replace(
    init=lambda _: (), update=lambda gradients, state, _: (gradients, state)
)


def batch_of(config):
    with BatchLoader(config.data, config.processor, make_tokenizer(config.data)) as batches:
        prepared = next(batches)
    return prepared.batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def both(folder):
    """The same pairs twice: each with a question of its own, and sharing it."""
    return [batch_of(pairs_config(folder, share_question=shared)) for shared in (False, True)]


# --- the sample ----------------------------------------------------------------------------------


def test_a_row_holds_each_image_once(both):
    apart, shared = both
    count = apart["answers"].max(axis=1) // 2
    assert 1 < count.max() <= PAIRS
    np.testing.assert_array_equal(count, shared["answers"].max(axis=1) // 2)
    np.testing.assert_array_equal(apart["tiles"], shared["tiles"])
    for row in range(len(count)):
        visual = apart["tokens"][row] == CONFIG.image_token_id
        tiles = apart["tiles"][row].any(axis=(1, 2, 3)).sum()
        assert visual.sum() == 2 * tiles * CONFIG.tokens_per_tile
        numbers, times = np.unique(apart["features"][row][visual], return_counts=True)
        np.testing.assert_array_equal(numbers, np.arange(tiles * CONFIG.tokens_per_tile))
        assert (times == 2).all()
        assert (
            shared["tokens"][row] == CONFIG.image_token_id
        ).sum() == tiles * CONFIG.tokens_per_tile
    assert (shared["segments"] > 0).sum() < 0.75 * (apart["segments"] > 0).sum()


def test_a_videos_frames_are_encoded_once(tmp_path):
    write_video(tmp_path / "clip.mp4", 20)
    row = {
        "video": "clip.mp4",
        "question": "What happens?",
        "chosen": "It gets brighter.",
        "rejected": "Nothing.",
    }
    source, frames = write_meta(tmp_path, clips={"rows": [row]}), 3
    config = train_config()
    settings = {
        "source": source,
        "pairs": True,
        "pairs_per_row": 1,
        "rows": 1,
        "min_frames": frames,
        "max_frames": frames,
    }
    batches = [
        batch_of(
            dataclasses.replace(
                config, data=dataclasses.replace(config.data, **settings, share_question=shared)
            )
        )
        for shared in (False, True)
    ]
    for batch, times in zip(batches, (2, 1), strict=True):
        visual = batch["tokens"][0] == CONFIG.image_token_id
        assert batch["tiles"][0].any(axis=(1, 2, 3)).sum() == frames
        numbers = np.arange(frames * CONFIG.tokens_per_tile)
        np.testing.assert_array_equal(batch["features"][0][visual], np.tile(numbers, times))


def test_only_the_chosen_answer_has_weight(both):
    for batch in both:
        assert ((batch["loss_weights"] > 0) == (batch["answers"] % 2 == 1)).all()
        sums = mpo.answer_sums(batch["loss_weights"], batch["answers"], PAIRS)
        present = batch["answers"].max(axis=1)[:, None] > 2 * np.arange(PAIRS)
        np.testing.assert_allclose(sums[..., 0], present, rtol=1e-6)  # data.loss_reduction "sample"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "chosen": "b"},
            "rejected is None; expected the keys question, chosen and rejected",
        ),
        ({"question": "a", "chosen": "b", "rejected": " "}, "rejected is ' '"),
        (
            {"question": "a", "chosen": "b", "rejected": "b"},
            "the same text: there is nothing to prefer",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "no pair of answers, but data.pairs is True",
        ),
        ({"question": "a", "chosen": "b" * 300, "rejected": "c"}, "raise data.tokens_per_row"),
        (
            {"question": "a", "chosen": "b" * 150, "rejected": "c" * 150},
            "a pair has .* tokens, a row holds 256",
        ),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, row, message):
    meta = write_meta(tmp_path, bad={"rows": [row]})
    config = train_config()
    data = dataclasses.replace(config.data, source=meta, pairs=True)
    with (
        BatchLoader(data, config.processor, make_tokenizer(data)) as batches,
        pytest.raises(SampleError, match=message),
    ):
        next(batches)


def test_a_pair_is_not_for_next_token_training(folder):
    data = dataclasses.replace(pairs_config(folder).data, pairs=False)
    with (
        BatchLoader(data, PROCESSOR, make_tokenizer(data)) as batches,
        pytest.raises(SampleError, match="a pair of answers"),
    ):
        next(batches)


# --- the loss ------------------------------------------------------------------------------------


def directly(params, batch, config: LossConfig, shift=None):
    """The loss without surrogate, from whole logits. shift: BCO's, else the mean of this batch's
    rewards.
    """

    def log_probabilities(params):
        logits = MODEL.apply({"params": params}, batch)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1
        )[..., 0]
        return mpo.answer_sums(picked, batch["answers"], PAIRS), logits

    policy, logits = log_probabilities(params)
    of_reference, _ = log_probabilities(OTHER)
    present = batch["answers"].max(axis=1)[:, None] > 2 * np.arange(PAIRS)
    if shift is None:
        rewards = config.beta * (policy - of_reference)
        shift = jnp.where(present[..., None], rewards, 0).sum() / (2 * present.sum())
    each = config.preference_weight * mpo.preference_loss(policy, of_reference, config)
    each += config.quality_weight * mpo.quality_loss(policy, of_reference, shift, config.beta)
    total, weight = cross_entropy(logits, batch["targets"], batch["loss_weights"])
    return (
        jnp.where(present, each, 0).sum() / present.sum()
        + config.generation_weight * total / weight
    )


@functools.cache
def compiled(loss, micro_batches=1, chunk=7):
    loss_fn = MpoLoss(MODEL, chunk, config=loss, pairs=PAIRS, drop_path=False)
    return jax.jit(functools.partial(train_step, loss_fn, GRADIENT, micro_batches=micro_batches))


def descent(batch, loss=LOSS, reference=OTHER, **settings):
    """(gradients, metrics) of one update."""
    state = TrainState(jnp.zeros((), jnp.int32), PARAMS, (), mpo.init_reward_shift())
    batch = {name: value for name, value in batch.items() if name != "sources"}
    state, metrics = compiled(loss, **settings)(state, batch, jax.random.key(0), reference)
    return jax.tree.map(lambda new, old: new - old, state.params, PARAMS), metrics


def assert_close(found, expected, tolerance):
    for path, leaf in by_path(expected).items():
        np.testing.assert_allclose(
            by_path(found)[path], leaf, rtol=tolerance, atol=tolerance, err_msg=path
        )


@pytest.mark.parametrize(
    "loss",
    [
        LOSS,
        dataclasses.replace(LOSS, quality_weight=0.0, generation_weight=0.0, label_smoothing=0.1),
        dataclasses.replace(LOSS, preference_weight=0.0, generation_weight=0.0),
    ],
    ids=["mpo", "preference alone", "quality alone"],
)
def test_loss_and_gradient_are_those_of_full_logits(both, loss):
    batch = both[0]
    expected, slopes = jax.value_and_grad(lambda params: directly(params, batch, loss, None))(
        PARAMS
    )
    # The shift has no gradient.
    shift = float(descent(batch, loss)[1]["reward_shift"])
    slopes = jax.grad(directly)(PARAMS, batch, loss, shift)
    gradients, metrics = descent(batch, loss)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert_close(gradients, slopes, 2e-5)


def test_a_shared_question_changes_no_number(both):
    """Nor a gradient: what the chosen answer's tokens see and are seen by is the same."""
    (apart, one), (shared, other) = (descent(batch) for batch in both)
    assert_close({name: other[name] for name in one}, one, 1e-5)
    assert_close(shared, apart, 2e-5)


def test_blocks_know_shared_questions(both):
    model = InternVL(CONFIG, attention_language="flash")
    expected = MODEL.apply({"params": PARAMS}, both[1])
    found = model.apply({"params": PARAMS}, both[1])
    real = both[1]["segments"] > 0
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_micro_batches_are_the_batch(both):
    """With the shift of earlier updates; the running one counts each of them."""
    loss = dataclasses.replace(LOSS, reward_shift="moving")
    whole, parts = descent(both[0], loss), descent(both[0], loss, micro_batches=2)
    assert_close(parts[0], whole[0], 2e-5)
    np.testing.assert_allclose(parts[1]["loss"], whole[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(parts[1]["reward_accuracy"], whole[1]["reward_accuracy"], rtol=1e-6)


def test_against_itself_the_preference_part_is_known(both):
    _, metrics = descent(both[0], LOSS, PARAMS)
    paired = 0.8 * metrics["loss_preference"] + 0.2 * metrics["loss_quality"]
    assert float(paired) == pytest.approx(mpo.at_start(LOSS), abs=1e-6)
    # Zero, but for where the two passes' sums are rounded.
    assert abs(float(metrics["reward_margin"])) < 1e-5
    assert abs(float(metrics["reward_shift"])) < 1e-5
    assert mpo.at_start(LOSS) == pytest.approx(0.8 * np.log(2) + 0.2 * 2 * np.log(2))


def test_a_reference_computed_beforehand_is_the_same(both):
    batch = both[0]
    expected, metrics = descent(batch)
    logits = MODEL.apply({"params": OTHER}, batch)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[
        ..., 0
    ]
    sums = mpo.answer_sums(picked, batch["answers"], PAIRS)
    first = (batch["answers"] > 0) & (
        batch["answers"] != np.pad(batch["answers"], ((0, 0), (1, 0)))[:, :-1]
    )
    given = np.where(first, mpo.at_answers(sums, batch["answers"]), 0)
    found, others = descent(batch | {"reference": given.astype(np.float32)}, reference=None)
    assert_close(found, expected, 2e-5)
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)


def test_eval_pairs_have_the_numbers_of_the_train_step(folder):
    config = pairs_config(folder, deltas=("1",))
    config = dataclasses.replace(
        config, loss=LOSS, eval=EvalConfig(config.data.source, batches=2), loss_chunk=7
    )
    evaluator = Evaluator(config, MODEL, make_tokenizer(config.data))
    found = evaluator.losses(PARAMS, mpo.init_reward_shift(), OTHER)
    each = [
        descent(batch, dataclasses.replace(LOSS, reward_shift="moving"))[1]
        for batch in evaluator.batches
    ]
    counts = [(batch["answers"].max(axis=1) // 2).sum() for batch in evaluator.batches]
    names = {
        "eval_loss": "loss",
        "eval_reward_accuracy": "reward_accuracy",
        "eval_loss_quality": "loss_quality",
    }
    for name, of_step in names.items():
        assert found[name] == pytest.approx(
            np.average([metrics[of_step] for metrics in each], weights=counts), rel=1e-5
        )
    of_sources = [found[f"eval_loss/{name}"] for name in ("seen", "text", "two")]
    assert min(of_sources) < found["eval_loss_generation"] < max(of_sources)
