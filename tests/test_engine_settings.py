"""Settings of single requests of the engine: log-probabilities, penalties, constraints, errors."""

import dataclasses

import jax
import numpy as np
import pytest

from internvl3_jax.inference.engine import programs
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.lockstep import LockstepEngine
from internvl3_jax.inference.engine.request import QueueFullError, Request, RowSampling
from internvl3_jax.inference.generator import ContextError, Generator
from internvl3_jax.inference.sampling import NotFiniteError
from internvl3_jax.model.internvl import InternVL
from tests.support.engine import LENGTH, OneAfterAnother, alone, ask, continued, shared_engine
from tests.support.generation import PARAMS, RAGGED, generator
from tests.support.tiny_checkpoint import CONFIG

# --- log-probabilities, penalties, constraints ----------------------------------------------------


def test_log_probabilities_are_those_of_the_model():
    engine = shared_engine()
    request = Request(
        RAGGED[1], RowSampling(temperature=1.5, seed=3), max_new_tokens=9, top_logprobs=4
    )
    pieces = []
    ticket = engine.submit(request, pieces.append)
    other = engine.submit(Request(RAGGED[1], max_new_tokens=9))
    engine.run()
    assert other.ids == alone(1, 20)[:9]
    values = [value for piece in pieces for value in piece.logprobs]
    assert len(values) == 9
    expected = jax.nn.log_softmax(_logits(RAGGED[1], ticket.ids))
    for step, (token, value) in enumerate(zip(ticket.ids, values, strict=True)):
        assert value.logprob == pytest.approx(float(expected[step, token]), abs=1e-4)
        order = np.argsort(-expected[step])[:4]
        assert [token for token, _ in value.top] == order.tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob in value.top], expected[step][order], atol=1e-4
        )


def _logits(prompt, ids):
    """The logits f32[n,V] from which each of `ids` follows."""
    text = continued(prompt, ids, [])
    size = CONFIG.vision.image_size
    batch = {
        "tokens": text.tokens[None],
        "positions": text.positions[None],
        "segments": np.ones((1, len(text.tokens)), np.int32),
        "tiles": np.zeros((1, 0, size, size, 3), np.uint8),
    }
    logits = InternVL(CONFIG).apply({"params": PARAMS}, batch)[0]
    return np.asarray(logits[len(prompt.tokens) - 1 : -1])


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 2.0},
    ],
)
def test_penalties_are_those_of_their_definitions(penalties):
    (ticket,) = ask(
        shared_engine(), Request(RAGGED[1], RowSampling(**penalties), max_new_tokens=20)
    )
    expected, prompt = [], set(RAGGED[1].tokens.tolist())
    factor = penalties.get("repetition_penalty", 1.0)
    for logits in _logits(RAGGED[1], ticket.ids):
        logits = logits.copy()
        for token in prompt | set(expected):
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(expected):
            logits[token] -= penalties.get("presence_penalty", 0)
            logits[token] -= penalties.get("frequency_penalty", 0) * expected.count(token)
        expected.append(int(logits.argmax()))
        assert ticket.ids[: len(expected)] == expected
    assert ticket.ids != alone(1, 20)


def test_min_p_leaves_only_likely_tokens():
    tickets = ask(
        shared_engine(),
        *(
            Request(RAGGED[1], RowSampling(temperature=3.0, min_p=0.5, seed=seed), 20)
            for seed in range(4)
        ),
    )
    for ticket in tickets:
        for logits, token in zip(_logits(RAGGED[1], ticket.ids), ticket.ids, strict=True):
            assert logits[token] / 3 >= logits.max() / 3 + np.log(0.5) - 1e-4
    assert len({tuple(ticket.ids) for ticket in tickets}) > 1


def test_logit_biases_change_one_row_only():
    token = 17
    first, second = ask(
        shared_engine(),
        Request(RAGGED[1], RowSampling(logit_bias={token: 100.0}), max_new_tokens=5),
        Request(RAGGED[1], max_new_tokens=5),
    )
    assert first.ids == [token] * 5
    assert second.ids == alone(1, 20)[:5]


def test_constraints_choose_the_tokens_of_their_row():
    constraint = OneAfterAnother([3, 1, 4, 1, 5, 9, 2, 6])
    first, second = ask(
        shared_engine(),
        Request(RAGGED[1], RowSampling(temperature=1.0), 8, constraint=constraint),
        Request(RAGGED[2], max_new_tokens=20),
    )
    assert first.ids == constraint.accepted == [3, 1, 4, 1, 5, 9, 2, 6]
    assert second.ids == alone(2, 20)


def test_a_broken_constraint_ends_its_own_request():
    broken, whole = ask(
        shared_engine(),
        Request(RAGGED[1], max_new_tokens=8, constraint=OneAfterAnother([3, 1])),
        Request(RAGGED[2], max_new_tokens=20),
    )
    assert (broken.finish, broken.ids) == ("error", [3, 1])
    assert isinstance(broken.error, IndexError)
    assert whole.ids == alone(2, 20)


# --- bad requests ---------------------------------------------------------------------------------


def test_rows_without_finite_logits_fail_alone():
    """The other rows continue, and the row can be used again."""
    engine = shared_engine()
    for _ in range(3):
        bad, good = ask(
            engine,
            Request(RAGGED[1], max_new_tokens=20, adapter="nan"),
            Request(RAGGED[1], max_new_tokens=20),
        )
        assert bad.finish == "error" and isinstance(bad.error, NotFiniteError)
        assert good.ids == alone(1, 20)
    (again, more) = ask(
        engine, Request(RAGGED[2], max_new_tokens=20), Request(RAGGED[3], max_new_tokens=20)
    )
    assert again.ids == alone(2, 20) and more.ids == alone(3, 20)


def test_an_error_of_who_asked_ends_that_request_and_is_kept():
    engine = shared_engine()

    def fail(piece):
        raise OSError("the client has left")

    left = engine.submit(Request(RAGGED[1], max_new_tokens=20), fail)
    at_its_end = engine.submit(Request(RAGGED[1], max_new_tokens=1), fail)
    (other,) = ask(engine, Request(RAGGED[2], max_new_tokens=20))
    assert (left.finish, at_its_end.finish) == ("error", "length")
    assert str(left.error) == str(at_its_end.error) == "the client has left"
    assert other.ids == alone(2, 20)


def test_requests_are_checked_when_they_are_submitted():
    engine = shared_engine()
    for request, message in [
        (Request(RAGGED[0], max_new_tokens=0), "max_new_tokens is 0"),
        (Request(RAGGED[0], adapter="x"), "no adapter 'x'; loaded are: a, b, nan"),
        (Request(RAGGED[0], stop_ids=tuple(range(17))), "17 stop ids; there may be 16"),
        (Request(RAGGED[0], top_logprobs=21), "top_logprobs is 21"),
        (Request(RAGGED[0], RowSampling(logit_bias={10**6: 1.0})), "has the id 1000000"),
        (Request(dataclasses.replace(RAGGED[0], tokens=RAGGED[0].tokens[:0])), "no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    with pytest.raises(ContextError, match="there is room for 256"):
        engine.submit(Request(RAGGED[0], max_new_tokens=250))
    for values in [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"presence_penalty": 3}]:
        with pytest.raises(ValueError, match=f"{next(iter(values))} is"):
            RowSampling(**values)
    assert not engine.step()


def test_a_full_queue_refuses():
    engine = Engine(generator(), rows=1, max_length=LENGTH, max_queue=2)
    tickets = [engine.submit(Request(RAGGED[1], max_new_tokens=3)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit(Request(RAGGED[1], max_new_tokens=3))
    engine.run()
    assert [ticket.ids for ticket in tickets] == [alone(1, 20)[:3]] * 2


def test_a_failed_engine_tells_its_requests():
    engine = Engine(generator(), rows=1, max_length=LENGTH)
    tickets = [engine.submit(Request(prompt, max_new_tokens=20)) for prompt in RAGGED[:2]]
    engine.step()

    def fail(*_):
        raise RuntimeError("the device is gone")

    engine._device.decode = fail
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.run()
    assert [ticket.finish for ticket in tickets] == ["error", "error"]
    with pytest.raises(RuntimeError, match="the engine has failed"):
        engine.submit(Request(RAGGED[0], max_new_tokens=20))


def test_on_several_hosts_an_error_of_one_ends_the_engine():
    """The others, which may not have met it, would wait for this host in the next program."""
    for isolates in (True, False):
        engine = Engine(generator(), rows=1, max_length=LENGTH)
        engine._scheduler.isolates_errors = isolates
        ticket = engine.submit(Request(RAGGED[0], max_new_tokens=2))

        def fail(*_):
            raise MemoryError("no memory on this host")

        engine._device.run_chunk = fail
        if isolates:
            engine.run()
        else:
            with pytest.raises(MemoryError, match="no memory on this host"):
                engine.run()
        assert ticket.finish == "error"
        assert isinstance(ticket.error, MemoryError)
    assert LockstepEngine(generator(), rows=1)._scheduler.isolates_errors is False


# --- accelerators ------------------------------------------------------------------------------------


def test_the_accelerators_path_gives_the_same_answers(monkeypatch):
    """Blocks of fixed length, started before the last one is read."""
    monkeypatch.setattr(programs, "on_cpu", lambda: False)
    one = Generator(CONFIG, PARAMS)
    one.calls_ahead = 1
    engine = Engine(one, rows=2, max_length=LENGTH)
    engine._device.on_cpu = False
    jax.clear_caches()
    limits = (20, 1, 17, 3, 20, 16)
    requests = [Request(RAGGED[k % 4], max_new_tokens=limit) for k, limit in enumerate(limits)]
    requests.append(Request(RAGGED[1], RowSampling(temperature=1.0, seed=4), max_new_tokens=20))
    *greedy, sampled = ask(engine, *requests)
    for k, (ticket, limit) in enumerate(zip(greedy, limits, strict=True)):
        assert ticket.ids == alone(k % 4, 20)[:limit]
    assert sampled.ids == alone(1, 20, 4, temperature=1.0)
    jax.clear_caches()
    shared_engine.cache_clear()
