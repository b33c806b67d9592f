"""Short answers: documents, charts and text in images."""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from internvl3_jax.evaluate.scorers.vqa_text import normalized

_ANLS_LEAST = 0.5
_TOLERANCE = 0.05  # of ChartQA
FORMULAS = "Handwritten Mathematical Expression Recognition"
# An answer of VCR with one of these counts as none; the third in any case.
_VOID = ("I can't", "I cannot", "sorry", "无法", "抱歉")


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the soft accuracy of TextVQA: the mean over all choices of nine of the ten
    references of min(1, number that equal the answer / 3).

    Raises:
      ValueError: there are not ten references.
    """
    if len(references) != 10:
        raise ValueError(f"{len(references)} references; TextVQA has ten")
    text = normalized(answer)
    equal = [normalized(reference) == text for reference in references]
    count = sum(equal)
    return sum(min(1.0, (count - one) / 3) for one in equal) / 10


def distance(a: str, b: str) -> int:
    """Returns the edit distance of two texts (Levenshtein 1966)."""
    short, long = sorted((a, b), key=len)
    row = list(range(len(short) + 1))
    for number, character in enumerate(long, 1):
        previous, row = row, [number]
        for place, other in enumerate(short):
            if character == other:
                row.append(previous[place])
            else:
                row.append(1 + min(previous[place], previous[place + 1], row[-1]))
    return row[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """Returns the normalized Levenshtein similarity to the nearest reference, 0.0 below 0.5.

    As in the official program, the distance is that of the texts with collapsed white space, and is
    divided by the longer length of the texts as they are.
    """
    best = 1 - min(_distance_share(answer, reference) for reference in references)
    return best if best >= _ANLS_LEAST else 0.0


def _distance_share(answer: str, reference: str) -> float:
    texts = [" ".join(text.strip().lower().split()) for text in (answer, reference)]
    longest = max(len(answer.upper()), len(reference.upper()))
    return distance(*texts) / longest if longest else 0.0


def relaxed_accuracy(answer: str, reference: str, corrected: bool = False) -> float:
    """Returns 1.0 for an answer of ChartQA within 5 %, or equal but for case, else 0.0.

    Args:
      corrected: 5 % of the reference, as in the paper of ChartQA. As published, the program had the
        roles swapped: 5 % of the answer.
    """
    answer = answer.strip()
    given, expected = _as_number(answer), _as_number(reference)
    value, base = (given, expected) if corrected else (expected, given)
    if value is not None and base:
        return float(abs(value - base) / abs(base) <= _TOLERANCE)
    return float(answer.lower() == reference.lower())


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocrbench(category: str, answer: str, references: Sequence[str]) -> int:
    """Returns 1 if an answer contains one of the references, else 0."""

    def plain(text: str) -> str:
        text = text if category == FORMULAS else text.lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if category == FORMULAS else text

    return int(any(plain(reference) in plain(answer) for reference in references))


def mtvqa(answer: str, reference: str) -> float:
    """Returns 100.0 if an answer contains the reference, without case and full stops, else 0.0."""
    text, expected = (part.strip().lower().replace(".", "") for part in (answer, reference))
    return 100.0 * (expected in text)


def vcr(
    answer: str, covered: str, tokenize: Callable[[str], list[str]]
) -> tuple[float, float, str]:
    """Compares an answer of VCR with one covered text.

    Args:
      tokenize: returns the tokens of a text; see `english_tokenizer`.

    Returns:
      (1.0 if the best run of tokens equals the covered text's, Jaccard index of the sets of
      tokens, the run). The run has as many tokens as the covered text, shares one with it, and is
      the most similar one by `difflib`.
    """
    answer = answer.split("Assistant: ")[-1]
    if any(word in (answer.lower() if word == "sorry" else answer) for word in _VOID):
        return 0.0, 0.0, ""
    tokens, wanted = tokenize(answer), tokenize(covered)
    best, ratio = [], 0.0
    for start in range(len(tokens) - len(wanted) + 1):
        run = tokens[start : start + len(wanted)]
        if set(run).isdisjoint(wanted):
            continue
        similarity = SequenceMatcher(None, " ".join(run), covered).ratio()
        if similarity > ratio:
            best, ratio = run, similarity
    if not best:
        return 0.0, 0.0, ""
    either = set(best) | set(wanted)
    return float(best == wanted), len(set(best) & set(wanted)) / len(either), " ".join(best)


def english_tokenizer() -> Callable[[str], list[str]]:
    """Returns spaCy's tokenizer of English, which is that of the model en_core_web_sm.

    Raises:
      ValueError: spaCy is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            "the tokens of VCR are those of spaCy, which is not installed: pip install spacy"
        ) from error
    tokenizer = spacy.blank("en").tokenizer
    return lambda text: [token.text for token in tokenizer(text)]
