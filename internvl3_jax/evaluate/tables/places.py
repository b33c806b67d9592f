"""Grounding, languages, screens."""

from internvl3_jax.evaluate.tables.forms import options, own
from internvl3_jax.evaluate.task import Task

_LANGUAGES = ("en", "zh", "pt", "ar", "tr", "ru")
_SPLITS = {
    "RefCOCO": ("refcoco", ("val", "testA", "testB")),
    "RefCOCO+": ("refcoco+", ("val", "testA", "testB")),
    "RefCOCOg": ("refcocog", ("val", "test")),
}

GROUNDING = [
    own(
        f"{file.replace('+', 'plus')}_{split.lower()}",
        f"{title} {split}",
        "grounding",
        f"refcoco/{file}_{split}.jsonl",
        "refcoco",
        "box",
        scorer="refcoco",
        max_new_tokens=100,
    )
    for title, (file, splits) in _SPLITS.items()
    for split in splits
]
MULTILINGUAL = [
    *(
        options(
            f"{name.lower()}_{language}",
            f"{title} {language}",
            "multilingual",
            f"{name}_{'cn' if language == 'zh' else language}",
            metric=metric,
        )
        for name, title, metric in (
            ("MMMB", "MMMB", "mean"),
            ("MMBench_dev", "MMBench", "circular"),
        )
        for language in _LANGUAGES
    ),
    options(
        "mtvqa",
        "MTVQA",
        "multilingual",
        "MTVQA_TEST",
        prompt="bare",
        scorer="mtvqa",
        arguments={"kind": "text", "letters": ""},
    ),
]
GUI = [
    Task(
        name,
        (title,),
        "gui",
        tuple(f"{prefix}_{part}.tsv" for part in ("Mobile", "Desktop", "Web")),
        "kit",
        "box",
        scorer="screenspot",
        max_tiles=12,
        arguments={"kind": "box", "letters": ""},
        note="the card's prompt is open; this is the kit's",
    )
    for name, title, prefix in (
        ("screenspot", "ScreenSpot", "ScreenSpot"),
        ("screenspot_v2", "ScreenSpot-V2", "ScreenSpot_v2"),
    )
]
