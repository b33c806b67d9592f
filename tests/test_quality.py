"""The comparison of a model in fewer bits with the model in full: it lets int8 pass, and nothing
that is damaged.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert
from examples.tiny_digits.recipe.evaluate import evaluate
from internvl3_jax import load
from internvl3_jax.inference import quality
from internvl3_jax.inference.quality import Quality, compare, main, reference_answers
from tests.support.tiny_checkpoint import TOKENIZER, directory

DIGITS = str(TOKENIZER)  # the shipped model
QUESTIONS = TOKENIZER / "questions.jsonl"

pytestmark = pytest.mark.optimized


@functools.cache
def answers():
    return reference_answers(load(DIGITS, dtype="float32"), quality.drawn_requests()[::3])


def few(**options):
    return load(DIGITS, dtype="float32", weights="int8", **options)


def test_a_model_is_itself():
    measured = compare(load(DIGITS, dtype="float32"), answers())
    assert measured.agreement == 1 and measured.mean_kl < 1e-7 and measured.passes(1e-6, 1)
    assert measured.prompts == 6 and measured.tokens == sum(len(one.answer) for one in answers())


def test_answers_are_those_of_generation():
    """Teacher forcing finds the greedy answers again: each token is the most likely one."""
    for reference in answers():
        assert reference.log_probs.argmax(axis=-1).tolist() == reference.answer
        np.testing.assert_allclose(np.exp(reference.log_probs).sum(axis=-1), 1, atol=1e-4)


def test_int8_passes_with_the_tower_too():
    assert compare(few(), answers()).passes()
    assert compare(few(quantize_tower=True), answers()).passes()
    with_cache = compare(few(), answers(), "int8")
    assert with_cache.passes() and with_cache != compare(few(), answers())


@pytest.mark.parametrize("damage", ["shifted", "larger", "not a number"])
def test_sabotaged_scales_fail(damage):
    """Of one kernel of one layer, or of the head; NaN is no small distance either."""
    checkpoint = few()
    place = checkpoint.params["language"]["head" if damage == "larger" else "layers"]
    place = place["kernel"] if damage == "larger" else place["down"]["kernel"]
    scales = place["scales"]
    place["scales"] = {
        "shifted": lambda: scales.at[1].set(jnp.roll(scales[1], 1, axis=-1) * 2),
        "larger": lambda: scales * jnp.linspace(0.5, 2, scales.shape[-1])[None],
        "not a number": lambda: scales.at[0].set(jnp.nan),
    }[damage]()
    measured = compare(checkpoint, answers())
    assert not measured.passes()
    assert "FAILS" in measured.table()


def test_nan_is_within_no_threshold():
    assert not Quality(1, 1, float("nan"), 1.0).passes(float("inf"), 0)
    assert Quality(1, 1, 0.02, 0.95).passes() and not Quality(1, 1, 0.021, 1.0).passes()
    assert not Quality(1, 1, 0.0, 0.94).passes()


def test_the_digits_model_keeps_its_accuracy():
    """At most 0.3 points of all questions about unseen handwriting."""
    full, less = (evaluate(checkpoint, 100) for checkpoint in (load(DIGITS), few()))
    tasks = [name for name in full if name != "digit"]
    lost = sum(full[name] - less[name] for name in tasks) / len(tasks)
    assert lost <= 0.003


def test_the_program_says_whether_it_passes(capsys):
    arguments = [DIGITS, "--weights", "int8", "--requests", str(QUESTIONS), "--max_prompts", "3"]
    assert main([*arguments, "--max_new_tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert f"{DIGITS} with int8 weights against {DIGITS} in full" in out
    assert "of 3 answers" in out and out.count(" ok") == 2
    assert main([*arguments, "--max_new_tokens", "8", "--max_kl", "-1"]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    for arguments, message in (
        ([DIGITS], "nothing to compare"),
        ([DIGITS, "--quantize_tower", "--reference", DIGITS], "--quantize_tower is about"),
        ([DIGITS, "--weights", "int8", "--max_prompts", "0"], "must be 1 or more"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    stored = str(tmp_path / "few")
    assert convert([str(directory()), stored, "--quantize", "int8"]) == 0
    assert main([stored, "--reference", stored]) == 1
    assert "is not the model in full" in capsys.readouterr().err
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"prompt": "a", "image": "missing.png"}) + "\n")
    assert main([stored, "--reference", str(directory()), "--requests", str(requests)]) == 1
    assert "missing.png" in capsys.readouterr().err


def test_a_conversion_is_checked_before_it_is_written(tmp_path, capsys):
    target = tmp_path / "few"
    arguments = [str(directory()), str(target), "--quantize", "int8", "--check_quality"]
    assert convert([*arguments, "--min_agreement", "1.01"]) == 1
    captured = capsys.readouterr()
    assert "FAILS" in captured.out and "nothing is written" in captured.err
    assert captured.err.count("\n") == 1 and not target.exists()
    assert convert([*arguments, "--min_agreement", "0", "--max_kl", "inf"]) == 0
    assert load(target).weights == "int8"
    with pytest.raises(SystemExit):
        convert([str(directory()), str(target), "--check_quality"])
    assert "--check_quality compares SRC" in capsys.readouterr().err
