"""The normalization of the VQA challenge, as InternVL's TextVQA program and VLMEvalKit have it."""

import re

# Contractions; each is also written without one of its apostrophes.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it
_NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,+\d")
_STOP = re.compile(r"\.(?!\d)")
_STOPS = 32  # that are deleted; the official code gives a flag of `re` where a count belongs


def without_punctuation(text: str) -> str:
    """Returns a text without punctuation: a mark that stands next to a blank anywhere is deleted,
    any other becomes a blank.
    """
    result, grouped = text, _GROUPED.search(text) is not None
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if alone or grouped else " ")
    return _STOP.sub("", result, count=_STOPS)


def normalized(text: str) -> str:
    """Returns an answer or a reference of TextVQA in the form in which they are compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
