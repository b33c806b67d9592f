"""make_pairs.py: which of a model's answers become pairs, resuming after a stop, questions that
cannot be asked, and rows that train.py reads.
"""

import json

import pytest

from internvl3_jax.config import DataConfig
from internvl3_jax.data.pipeline import make_tokenizer, sample_dataset
from internvl3_jax.inference.chat import Answer
from internvl3_jax.reward import question_program
from internvl3_jax.reward.make_pairs import main, run, summary
from internvl3_jax.reward.pairs import PairSettings, choose_pairs, find_pairs, first_half
from internvl3_jax.reward.question_output import done_path, failures
from internvl3_jax.reward.questions import Question, read_questions
from internvl3_jax.training.make_reference import read_known
from tests.support import tiny_checkpoint
from tests.support.tiny_checkpoint import PROCESSOR, make_image


class Model:
    """Gives the answers that it is made with, in turn; continues any beginning with "and so on"."""

    def __init__(self, **answers: list[str]):
        self.answers, self.asked = answers, []

    def candidates(self, requests, n, *, answer_prefixes=(), seed=0, names=(), **options):
        self.asked.append((requests, n, answer_prefixes, options))
        broken = [
            name
            for name, (_, images) in zip(names, requests, strict=False)
            if "broken.png" in images
        ]
        if broken:
            raise ValueError(f"{broken[0]}: broken.png: cannot be decoded")
        texts = [self.answers[question.split()[-1]] for question, _ in requests]
        if answer_prefixes:
            return [[Answer(" and so on", [1], 5, [], 0.0, 0.0)] for _ in requests]
        return [
            [Answer(text[k % len(text)], [1], 5, [], 0.0, 0.0) for k in range(n)] for text in texts
        ]


def question(name: str, answer: str | None = "6") -> Question:
    return Question(name, f"<image>\nadd {name}", ["a.png"], answer, "a.png")


def pairs_of(*answers: str, settings=None):
    (found,) = find_pairs(
        Model(q=list(answers)), [question("q")], settings or PairSettings(samples=8)
    )
    return found


def texts(result) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in result.rows]


def test_right_answers_with_wrong_ones():
    found = pairs_of("it is 6. Answer: 6", "Answer: 7", r"\boxed{6.0}", "Answer: 5", "Answer: 7")
    assert set(texts(found)) == {
        (a, b) for a in ("it is 6. Answer: 6", r"\boxed{6.0}") for b in ("Answer: 7", "Answer: 5")
    }
    assert found.counts == {"right": 2, "wrong": 2, "unstated": 0}
    assert found.rows[0] == {
        "id": "q",
        "image": "a.png",
        "question": "<image>\nadd q",
        "chosen": "it is 6. Answer: 6",
        "rejected": "Answer: 7",
    }


def test_a_question_of_one_kind_gives_none():
    assert pairs_of("Answer: 6", r"\boxed{6}").rows == [] and pairs_of("Answer: 7").rows == []


def test_what_states_nothing_is_wrong_only_if_asked_for():
    answers = ("Answer: 6", "I wonder", "")
    found = pairs_of(*answers)
    assert texts(found) == [] and found.counts["unstated"] == 1
    found = pairs_of(*answers, settings=PairSettings(samples=8, format_negatives=True))
    assert texts(found) == [("Answer: 6", "I wonder")]


@pytest.mark.parametrize(
    ("right", "wrong", "pairs"),
    [
        ("so Answer: 6", "so Answer: 60", 0),
        ("Answer: 6", "Answer: 6\nNo: Answer: 7", 1),  # the texts are not compared
        ("Answer: 6", "Answer: 7", 1),
        ("ANSWER: 6", r"about \boxed{16}", 0),
    ],
)
def test_a_rejected_stated_answer_does_not_contain_the_chosen_one(right, wrong, pairs):
    """As in InternVL's build_pairs_based_on_pos_neg."""
    assert len(pairs_of(right, wrong).rows) == pairs


def test_case_does_not_matter_there():
    (found,) = find_pairs(
        Model(q=["Answer: Red", "Answer: dark red"]),
        [question("q", "red")],
        PairSettings(samples=2),
    )
    assert (found.counts["right"], found.counts["wrong"], found.rows) == (1, 1, [])


def test_the_most_pairs_are_drawn_once_and_for_all():
    right, wrong = [f"r{n}" for n in range(6)], [f"w{n}" for n in range(6)]
    kept = choose_pairs(right, wrong, 15, 0)
    assert len(set(kept)) == 15 and kept == choose_pairs(right, wrong, 15, 0) != choose_pairs(
        right, wrong, 15, 1
    )
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("one two three four", "one two"),
        ("one two three", "one"),
        ("one\n\ntwo three four five", "one\n\ntwo three"),
        ("The cat sat on the mat today ok", "The cat sat on"),
        ("one\n two", "one"),
        ("one", ""),
        ("", ""),
    ],
)
def test_the_first_half(text, half):
    assert first_half(text) == half


def test_without_an_answer_the_second_half_is_made_blind():
    model = Model(q=["one two three four"])
    (found,) = find_pairs(model, [question("q", None)], PairSettings())
    assert texts(found) == [("one two three four", "one two and so on")]
    assert model.asked[0][0] == [("<image>\nadd q", ["a.png"])] and model.asked[1][0] == [
        ("add q", [])
    ]
    assert model.asked[1][2] == ["one two"]


def test_it_resumes_after_the_last_finished_question(tmp_path):
    answers = {f"q{n}": ["Answer: 6", "Answer: 7"] if n % 2 else ["Answer: 7"] for n in range(6)}
    questions, settings = (
        [question(name) for name in answers],
        PairSettings(samples=2, batch_size=4),
    )
    output = tmp_path / "pairs.jsonl"
    run(Model(**answers), questions, output, settings)
    whole, done = output.read_bytes(), done_path(output).read_bytes()
    assert whole.count(b"\n") == 3 and done.count(b"\n") == 6
    assert summary(output) == "3 pairs of 3 of 6 questions; 0 were always answered right, 3 never"
    # Stopped while rows were written, before their questions were finished.
    done_path(output).write_bytes(b"".join(done.splitlines(keepends=True)[:2]) + b'{"id": "q')
    model = Model(**answers)
    run(model, questions, output, settings)
    assert output.read_bytes() == whole and done_path(output).read_bytes() == done
    assert [len(requests) for requests, *_ in model.asked] == [2, 2]
    others = (
        (questions[::-1], settings, ""),
        (questions, PairSettings(samples=2, temperature=0.1), ""),
        (questions, settings, "another"),
    )
    for other in others:
        with pytest.raises(ValueError, match="has rows of other questions"):
            run(model, other[0], output, *other[1:])
    for content in (None, b"notes", b'{"scores": 1}\n'):
        output.write_bytes(content) if content else output.unlink()
        with pytest.raises(ValueError, match="are not both of make_pairs"):
            run(model, questions, output, settings)
        assert content is None or output.read_bytes() == content
    output.write_bytes(whole)
    done_path(output).write_bytes(b"mine")
    with pytest.raises(ValueError, match="are not both of make_pairs"):
        run(model, questions, output, settings)
    assert (output.read_bytes(), done_path(output).read_bytes()) == (whole, b"mine")


def test_a_question_that_cannot_be_asked(tmp_path, capsys):
    """It fails alone; the others of its batch have their pairs."""
    answers = {f"q{n}": ["Answer: 6", "Answer: 7"] for n in range(4)}
    questions = [question(name) for name in answers]
    questions[1].images, questions[1].where = ["broken.png"], "q.jsonl line 2 (id 'q1')"
    output, settings = tmp_path / "pairs.jsonl", PairSettings(samples=2, batch_size=8)
    with pytest.raises(ValueError, match=r"^q.jsonl line 2 \(id 'q1'\): broken.png: cannot be"):
        run(Model(**answers), questions, output, settings, on_error="stop")
    output.unlink(), done_path(output).unlink()
    run(Model(**answers), questions, output, settings)
    done = [json.loads(line) for line in done_path(output).read_text().splitlines()]
    assert [line["rows"] for line in done] == [1, 0, 1, 1]
    assert done[1]["error"] == "q.jsonl line 2 (id 'q1'): broken.png: cannot be decoded"
    assert summary(output).startswith("3 pairs of 3 of 3 questions")
    assert failures(output).startswith(
        "1 of 4 questions could not be asked; "
        f'{done_path(output)} says why in "error", and --retry_errors asks them again. The first: '
        "q.jsonl line 2 (id 'q1'): broken.png"
    )
    # Resumed, it is not asked again; with retry_errors it is.
    model = Model(**answers)
    run(model, questions, output, settings)
    assert model.asked == []
    questions[1].images = ["a.png"]
    run(model, questions, output, settings, retry_errors=True)
    assert failures(output) == "" and summary(output).startswith("4 pairs of 4 of 4 questions")
    rows = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert rows == ["q0", "q2", "q3", "q1"]


@pytest.mark.parametrize(
    "tail", [b"\0" * 40, b'{"id": "q', b'{"id": "q1\0\0\0', b'{"id": "\xe4\xb9']
)
def test_a_torn_tail_is_cut_off(tmp_path, capsys, tail):
    answers = {f"q{n}": ["Answer: 6", "Answer: 7"] for n in range(3)}
    questions, settings = [question(name) for name in answers], PairSettings(samples=2)
    output = tmp_path / "pairs.jsonl"
    run(Model(**answers), questions, output, settings)
    rows, done = output.read_bytes(), done_path(output).read_bytes()
    output.write_bytes(rows[: rows.index(b"\n") + 1] + tail)
    done_path(output).write_bytes(done[: done.index(b"\n") + 1] + tail)
    run(Model(**answers), questions, output, settings)
    assert (output.read_bytes(), done_path(output).read_bytes()) == (rows, done)
    error = capsys.readouterr().err
    assert error.count(f"the last {len(tail)} bytes, after line 1, are a torn row") == 2


def test_answers_that_cannot_be_read_are_counted(tmp_path):
    output, questions = tmp_path / "pairs.jsonl", [question("q1"), question("q2")]
    run(Model(q1=["39", "40"], q2=["6"]), questions, output, PairSettings(samples=2))
    with pytest.raises(
        ValueError,
        match=r'none of the 3 different answers could be read; wanted is a stated answer \("Answer',
    ):
        summary(output)
    other = tmp_path / "other.jsonl"
    run(Model(q1=["39", "Answer: 6"], q2=["Answer: 7"]), questions, other, PairSettings(samples=2))
    assert "1 of 3 different answers could not be read" in summary(other)


def test_what_looks_like_the_end_of_a_line_is_none(tmp_path):
    """Of Unicode's ends of lines only one is JSON's."""
    answers = {f"q{n}": ["so\u2028it is\x85Answer: 6", "Answer: 7"] for n in range(3)}
    questions, settings, output = (
        [question(name) for name in answers],
        PairSettings(samples=2),
        tmp_path / "pairs.jsonl",
    )
    run(Model(**answers), questions, output, settings)
    whole = output.read_bytes()
    run(Model(**answers), questions, output, settings)
    assert output.read_bytes() == whole


def test_the_program_makes_rows_that_train_py_reads(tmp_path, monkeypatch, capsys):
    make_image(20, 20).save(tmp_path / "a.png")
    rows = [
        {"question": "add 1", "image": "a.png", "answer": 6},
        {"question": "add 2", "image": "a.png"},
    ]
    path, output = tmp_path / "questions.jsonl", tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [q.answer for q in read_questions(path, need_answers=False)] == ["6", None]
    answers = {"1": ["Answer: 6", "Answer: 7"], "2": ["one two three four"]}
    monkeypatch.setattr(question_program, "Chat", lambda checkpoint, **options: Model(**answers))
    arguments = [
        "--checkpoint",
        str(tiny_checkpoint.directory()),
        "--questions",
        str(path),
        "--output",
        str(output),
    ]
    assert main([*arguments, "--samples", "2", "--format_negatives"]) == 0
    assert "2 pairs of 2 of 2 questions" in capsys.readouterr().out
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"made": {"root": str(tmp_path), "annotation": str(output)}}))
    config = DataConfig(
        source=str(meta),
        tokenizer=str(tiny_checkpoint.TOKENIZER),
        pairs=True,
        tokens_per_row=256,
        tiles_per_row=12,
    )
    samples = sample_dataset(config, PROCESSOR, make_tokenizer(config))
    assert all(
        sample["answers"].max() == 2 and len(sample["tiles"]) for sample in (samples[0], samples[1])
    )
    assert main([*arguments, "--samples", "0"]) == 1
    assert "samples is 0; it must be at least 1" in capsys.readouterr().err


def test_log_probabilities_of_the_reference_never_replace_another_file(tmp_path):
    path, header = (
        tmp_path / "reference.jsonl",
        {"reference": "a", "hash": "0a", "dtype": "float32"},
    )
    assert read_known(path, header) == (set(), 0)
    row = b'{"key": "k1", "chosen": -1.0, "rejected": -2.0}\n'
    whole = json.dumps(header).encode() + b"\n" + row
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].rfind(b"\n") + 1
        assert read_known(path, header) == ({"k1"} if cut == len(whole) else set(), kept)
    assert read_known(path, header | {"reference": "moved"})[0] == {"k1"}
    with pytest.raises(ValueError, match="is not of a with these parameters and dtype"):
        read_known(path, header | {"hash": "0b"})
    for foreign in (
        b"notes",
        b'{"scores": 1}',
        b'{"scores": 1}\n',
        whole + b"mine",
        whole + b'{"a": 1}\n',
    ):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="name another --output"):
            read_known(path, header)
        assert path.read_bytes() == foreign
