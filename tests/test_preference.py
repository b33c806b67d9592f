"""MPO's losses: against PyTorch and trl, whose functions InternVL's training code calls; and their
shift.
"""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from internvl3_jax.config import UNITS, LossConfig, ProcessorConfig
from internvl3_jax.data.packing import join
from internvl3_jax.data.pairs import finish_pair
from internvl3_jax.data.text.chat_template import Encoded
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.training import mpo
from internvl3_jax.training.objective import MpoLoss
from tests.support.parity import conversation, pair, pixels, torch_logits

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)
POLICY, REFERENCE = (RNG.normal(-40, 12, (3, 5, 2)).astype(np.float32) for _ in range(2))
SHIFT = 0.3
LOSSES = {
    "sigmoid": LossConfig(),
    "smoothed": LossConfig(label_smoothing=0.15, beta=0.3),
}


def of_torch(name: str, policy, reference):
    """f32[3,5] of trl's formulas, written with PyTorch's functions."""
    config = LOSSES.get(name, LossConfig())
    gain = policy - reference
    if name == "quality":
        rewards = config.beta * gain
        return -F.logsigmoid(rewards[..., 0] - SHIFT) - F.logsigmoid(-(rewards[..., 1] - SHIFT))
    margin = config.beta * (gain[..., 0] - gain[..., 1])
    return (
        -F.logsigmoid(margin) * (1 - config.label_smoothing)
        - F.logsigmoid(-margin) * config.label_smoothing
    )


def of_ours(name: str, policy):
    if name == "quality":
        return mpo.quality_loss(policy, REFERENCE, SHIFT, 0.1)
    return mpo.preference_loss(policy, REFERENCE, LOSSES[name])


@pytest.mark.parametrize("name", [*LOSSES, "quality"])
def test_losses_and_gradients_are_those_of_pytorch(name):
    policy = torch.tensor(POLICY, requires_grad=True)
    expected = of_torch(name, policy, torch.tensor(REFERENCE))
    expected.sum().backward()
    found, slopes = jax.value_and_grad(lambda policy: of_ours(name, policy).sum())(POLICY)
    np.testing.assert_allclose(of_ours(name, POLICY), expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, float(expected.detach().sum()), rtol=1e-5)
    np.testing.assert_allclose(slopes, policy.grad, rtol=1e-5, atol=1e-7)


def trl_trainer(config: LossConfig):
    """trl's DPOTrainer without what trains: its method `dpo_loss` alone."""
    from trl import import_utils

    # trl asks transformers which optional packages there are, in a way that transformers 5 answers
    # differently.
    for name in vars(import_utils).copy():
        if name.startswith("is_") and name.endswith("_available"):
            setattr(import_utils, name, lambda *_, **__: False)
    trl = importlib.import_module("trl.trainer.dpo_trainer")
    utils = importlib.import_module("trl.trainer.utils")
    accelerator = types.SimpleNamespace(device="cpu", use_distributed=False)
    own = types.SimpleNamespace(
        accelerator=accelerator,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        reference_free=False,
        f_divergence_type=trl.FDivergenceType.REVERSE_KL,
        running=utils.RunningMoments(accelerator),
    )
    return lambda *logps, loss: trl.DPOTrainer.dpo_loss(own, *logps, loss), own


@pytest.mark.trl
@pytest.mark.parametrize("name", [*LOSSES, "quality"])
def test_losses_and_gradients_are_those_of_trl(name):
    config = LOSSES.get(name, LossConfig())
    run, own = trl_trainer(config)
    policy = torch.tensor(POLICY, requires_grad=True)
    values = [x.reshape(-1, 2).T for x in (policy, torch.tensor(REFERENCE))]
    kind = {"quality": "bco_pair"}.get(name, "sigmoid")
    losses = run(values[0][0], values[0][1], values[1][0], values[1][1], loss=kind)[0].reshape(3, 5)
    losses.sum().backward()
    if name == "quality":

        def ours(policy):
            present = jnp.ones((3, 5), bool)
            rewards = config.beta * (policy - REFERENCE)
            shift = mpo.running_shift(mpo.init_reward_shift(), rewards, present)
            np.testing.assert_allclose(shift.mean, own.running.mean, rtol=1e-5)
            return mpo.quality_loss(policy, REFERENCE, shift.mean, config.beta)
    else:

        def ours(policy):
            return of_ours(name, policy)

    np.testing.assert_allclose(ours(POLICY), losses.detach(), rtol=1e-5, atol=1e-6)
    pull = (
        jax.vjp(ours, POLICY)[1]
        if name != "quality"
        else jax.vjp(lambda p: of_shift(p, own.running.mean, config), POLICY)[1]
    )
    np.testing.assert_allclose(
        pull(np.ones((3, 5), np.float32))[0], policy.grad, rtol=1e-5, atol=1e-7
    )


def of_shift(policy, shift, config):
    return mpo.quality_loss(policy, REFERENCE, shift, config.beta)


def rewards_of(mean: float):
    """Three places for pairs, of which one is empty."""
    return jnp.array([[[mean + 1, mean - 1], [mean + 3, mean - 3], [100.0, 100.0]]]), jnp.array(
        [[True, True, False]]
    )


def test_the_running_shift_is_the_mean_of_all_rewards_with_the_present_ones():
    shift, used = mpo.init_reward_shift(), []
    for mean in (1.0, 2.0, 6.0):
        shift = mpo.running_shift(shift, *rewards_of(mean))
        used.append(float(shift.mean))
    np.testing.assert_allclose(used, [1.0, 1.5, 3.0], rtol=1e-6)
    assert float(shift.count) == 3


def test_the_moving_shift_is_of_earlier_rewards():
    shift, used = mpo.init_reward_shift(), []
    for mean in (1.0, 2.0, 6.0):
        used.append(float(shift.mean))
        shift = mpo.moving_shift(shift, mean, 0.75)
    np.testing.assert_allclose(used, [0.0, 1.0, 1.25], rtol=1e-6)


def test_a_batch_without_pairs_leaves_no_trace_of_numbers():
    shift = mpo.running_shift(mpo.init_reward_shift(), rewards_of(1.0)[0], jnp.zeros((1, 3), bool))
    assert float(shift.mean) == 0


def test_no_gradient_goes_through_the_shift():
    slope = jax.grad(lambda shift: mpo.quality_loss(POLICY, REFERENCE, shift, 0.1).sum())(0.5)
    assert float(slope) == 0


def test_sums_over_answers_and_back():
    answers = np.array([[0, 1, 1, 0, 2, 2, 3, 0, 4], [0, 0, 1, 2, 0, 0, 0, 0, 0]])
    values = np.arange(18, dtype=np.float32).reshape(2, 9)
    sums = mpo.answer_sums(values, answers, 3)
    np.testing.assert_array_equal(sums, [[[3, 9], [6, 8], [0, 0]], [[11, 12], [0, 0], [0, 0]]])
    back = mpo.at_answers(sums, answers)
    np.testing.assert_array_equal(
        back, [[0, 3, 3, 0, 9, 9, 6, 0, 8], [0, 0, 11, 12, 0, 0, 0, 0, 0]]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dpo"}, "loss.kind is 'dpo'; it must be one of sft, mpo"),
        ({"reward_shift": "none"}, "loss.reward_shift is 'none'"),
        ({"quality_weight": -1.0}, "none may be negative"),
        (
            {"preference_weight": 0.0, "quality_weight": 0.0, "generation_weight": 0.0},
            "one must be above 0",
        ),
        ({"beta": 0.0}, "loss.beta is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
    ],
)
def test_what_makes_no_sense_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        mpo.check(LossConfig(**changes))


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", [("300m", "qwen2"), ("6b", "internlm3")], ids="-".join)
@pytest.mark.parametrize("shared", [False, True], ids=["two questions", "a shared question"])
def test_log_probabilities_are_those_of_transformers(family, shared):
    """Of two pairs in one row, where transformers gets each answer's conversation by itself."""
    torch_model, config, params = pair(*family)
    rng, size = np.random.default_rng(5), config.vision.image_size
    processor = ProcessorConfig(image_size=size, tokens_per_tile=config.tokens_per_tile)
    samples, expected = [], []
    for tiles in (2, 1):
        question, runs = conversation(config, (tiles,), rng)
        image_tiles = rng.integers(0, 256, (tiles, size, size, 3), dtype=np.uint8)
        sides = []
        for length in (6, 3):
            answer = rng.integers(0, config.image_token_id, length)
            sides.append(
                Encoded(
                    np.append(question, answer).astype(np.int32),
                    np.arange(len(question) + length) >= len(question),
                    runs,
                )
            )
            logits = torch.from_numpy(
                torch_logits(torch_model, sides[-1].tokens[None], pixels(image_tiles, config))
            )
            each = torch.log_softmax(logits[0, len(question) - 1 : -1], dim=-1)
            expected.append(each[torch.arange(length), torch.from_numpy(answer)].sum().item())
        samples.append(
            finish_pair(sides[1], sides[0], [image_tiles], [UNITS], processor, "sample", shared)
        )
    row = join(samples, 96, 3)
    batch = {name: value[None] for name, value in row.items() if name != "sources"}
    found = MpoLoss(InternVL(config), 16, pairs=2).ref_logps(params, params, batch)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-4)
