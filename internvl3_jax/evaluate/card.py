"""The numbers of the InternVL3 model card, and how it averages them.

A group is a table of the card; `Overall` is the plain mean of its columns, each divided by its
scale, except that the two sets of six languages count once each. These formulas give every printed
Overall, of other models' rows too, to 0.05.
"""

import dataclasses
from collections.abc import Mapping, Sequence

SIZES = ("1B", "2B", "8B", "9B", "14B", "38B", "78B")
_LANGUAGES = ("en", "zh", "pt", "ar", "tr", "ru")


@dataclasses.dataclass(frozen=True)
class Group:
    """One table of the card.

    Attributes:
      name, title: as flags and reports call it.
      columns: names, in the order of the card.
      rows: size, or size with "Bo8" -> the columns' numbers and Overall.
      scales: column -> what it is divided by in Overall.
      together: sets of columns that count as one in Overall.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    together: tuple[tuple[str, ...], ...] = ()
    has_overall: bool = True

    def overall(self, scores: Mapping[str, float]) -> float | None:
        """Returns the mean as the card counts it; None unless all columns are there."""
        if not self.has_overall or any(scores.get(column) is None for column in self.columns):
            return None
        scaled = {name: scores[name] / self.scales.get(name, 1.0) for name in self.columns}
        parts = [_mean([scaled.pop(name) for name in names]) for names in self.together]
        return _mean([*scaled.values(), *parts])

    def published(self, size: str, best_of: bool = False) -> dict[str, float]:
        """Returns column -> number of the card, with "Overall"; {} if it has no such row."""
        row = self.rows.get(f"{size} Bo8" if best_of else size)
        names = (*self.columns, "Overall") if self.has_overall else self.columns
        return dict(zip(names, row, strict=True)) if row else {}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _rows(text: str) -> dict[str, tuple[float, ...]]:
    """Reads lines of "SIZE: numbers"."""
    lines = [line.split(":") for line in text.strip().splitlines()]
    return {name.strip(): tuple(map(float, numbers.split())) for name, numbers in lines}


REASONING = Group(
    "reasoning",
    "Reasoning and mathematics",
    ("MMMU", "MathVista", "MathVision", "MathVerse", "DynaMath", "WeMath", "LogicVista"),
    _rows("""
1B: 43.4 45.8 18.8 18.7 5.8 13.4 29.8 25.1
1B Bo8: 55.4 62.1 21.7 28.9 13.4 28.5 34.9 35.0
2B: 48.6 57.0 21.7 25.3 14.6 22.4 36.9 32.4
2B Bo8: 57.8 70.5 26.6 36.7 21.4 38.5 40.5 41.7
8B: 62.7 71.6 29.3 39.8 25.5 37.1 44.1 44.3
8B Bo8: 66.0 75.2 37.5 46.3 28.5 48.1 49.7 50.2
9B: 57.7 71.5 27.6 35.3 26.7 33.8 49.2 43.1
9B Bo8: 63.7 76.2 33.9 45.8 29.1 46.6 50.6 49.4
14B: 67.1 75.1 37.2 44.4 31.3 43.0 51.2 49.9
14B Bo8: 69.3 77.9 40.1 47.7 33.1 52.0 56.2 53.8
38B: 70.1 75.1 34.2 48.2 35.3 48.6 58.4 52.8
38B Bo8: 71.0 79.4 41.8 54.2 36.1 55.2 58.4 56.6
78B: 72.2 79.0 43.1 51.0 35.1 46.1 55.9 54.6
78B Bo8: 72.2 80.5 40.8 54.2 37.3 52.4 57.9 56.5
"""),
)
OCR = Group(
    "ocr",
    "OCR, charts and documents",
    (
        "AI2D (mask)",
        "AI2D (no mask)",
        "ChartQA",
        "TextVQA",
        "DocVQA",
        "InfoVQA",
        "OCRBench",
        "SEED-2+",
        "CharXiv RQ",
        "CharXiv DQ",
        "VCR EM",
        "VCR Jaccard",
    ),
    _rows("""
1B: 69.4 78.3 75.3 74.1 81.9 53.7 790 58.2 21.0 47.1 89.3 96.2 68.6
2B: 78.7 87.4 80.2 77.0 88.3 66.1 835 64.6 28.3 54.7 91.2 96.9 74.7
8B: 85.2 92.6 86.6 80.2 92.7 76.8 880 69.7 37.6 73.6 94.5 98.1 81.3
9B: 84.6 92.9 86.2 79.4 93.6 79.6 877 68.8 38.0 72.5 94.2 97.9 81.3
14B: 86.0 93.7 87.3 80.5 94.1 83.6 875 70.3 43.1 82.2 94.8 98.2 83.4
38B: 88.9 95.5 89.2 83.9 95.4 85.0 886 71.6 46.4 87.2 96.1 98.7 85.5
78B: 89.7 96.0 89.7 84.3 95.4 86.5 906 71.9 46.0 85.1 96.0 98.6 85.8
"""),
    scales={"OCRBench": 10.0},
)
MULTI_IMAGE = Group(
    "multi_image",
    "Several images",
    ("BLINK", "Mantis", "MMIU", "MuirBench", "MMT-Bench", "MIRB"),
    _rows("""
1B: 42.9 50.2 39.3 31.2 52.9 36.1 42.1
2B: 50.3 65.9 43.0 38.8 59.5 42.9 50.1
8B: 55.5 70.1 46.8 55.0 65.0 56.8 58.2
9B: 58.6 70.1 50.4 51.4 65.4 58.6 59.1
14B: 60.3 76.0 50.9 56.2 70.3 59.3 62.2
38B: 64.0 77.9 57.4 63.8 71.8 62.3 66.2
78B: 66.3 79.3 60.4 64.5 73.2 64.3 68.0
"""),
)
REAL_WORLD = Group(
    "real_world",
    "Real world",
    ("RealWorldQA", "MME-RealWorld", "WildVision", "R-Bench"),
    _rows("""
1B: 58.2 46.0 43.8 60.4 52.1
2B: 64.3 53.8 48.8 67.5 58.6
8B: 70.8 62.0 69.8 74.1 69.2
9B: 70.5 61.3 63.8 70.3 66.5
14B: 70.7 64.0 69.8 69.3 68.5
38B: 75.6 67.3 71.6 73.3 72.0
78B: 78.0 65.4 73.6 77.4 73.6
"""),
)
COMPREHENSIVE = Group(
    "comprehensive",
    "Comprehensive",
    ("MME", "MMBench EN", "MMBench CN", "MMBench v1.1", "MMVet", "MMVet v2", "MMStar"),
    _rows("""
1B: 1934.4 72.6 67.9 69.9 59.5 47.5 51.5 61.9
2B: 2221.2 81.1 78.4 78.6 62.2 53.9 60.7 69.8
8B: 2415.4 83.4 82.2 81.7 81.3 66.3 68.2 77.7
9B: 2372.8 83.4 82.2 81.7 76.2 65.4 66.3 76.3
14B: 2478.3 85.6 84.1 83.5 80.2 68.4 68.8 79.0
38B: 2523.6 87.6 86.8 86.9 83.9 69.6 71.5 81.5
78B: 2549.8 89.0 88.7 87.7 81.3 70.0 72.5 82.0
"""),
    scales={"MME": 30.0},
)
HALLUCINATION = Group(
    "hallucination",
    "Hallucination",
    ("HallusionBench", "MMHal", "CRPE", "POPE"),
    _rows("""
1B: 41.4 2.59 64.0 90.7 49.7
2B: 42.5 3.26 71.5 89.6 51.7
8B: 49.9 3.61 76.3 91.1 55.2
9B: 51.2 3.47 75.0 90.4 55.0
14B: 55.1 3.49 77.3 90.2 56.5
38B: 57.1 3.77 77.1 90.6 57.1
78B: 59.1 3.85 79.2 90.3 58.1
"""),
)
GROUNDING = Group(
    "grounding",
    "Visual grounding",
    (
        "RefCOCO val",
        "RefCOCO testA",
        "RefCOCO testB",
        "RefCOCO+ val",
        "RefCOCO+ testA",
        "RefCOCO+ testB",
        "RefCOCOg val",
        "RefCOCOg test",
    ),
    _rows("""
1B: 85.8 90.1 81.7 76.6 84.1 69.2 82.8 82.6 81.6
2B: 89.8 92.6 86.4 84.0 89.2 76.5 87.6 87.2 86.7
8B: 92.5 94.6 88.0 88.2 92.5 81.8 89.6 90.0 89.6
9B: 91.8 93.2 86.6 86.4 91.0 79.9 88.0 88.5 88.2
14B: 92.0 94.4 87.8 87.4 92.1 81.5 88.6 89.3 89.1
38B: 93.2 95.1 90.2 89.8 93.2 85.2 91.4 91.5 91.2
78B: 93.4 95.4 90.3 90.1 93.8 85.3 91.5 91.5 91.4
"""),
)
MULTILINGUAL = Group(
    "multilingual",
    "Multilingual",
    (
        *(f"MMMB {language}" for language in _LANGUAGES),
        *(f"MMBench {language}" for language in _LANGUAGES),
        "MTVQA",
    ),
    _rows("""
1B: 79.4 70.1 62.3 58.0 47.6 61.9 72.6 66.2 62.3 48.0 39.5 60.3 22.2 47.9
2B: 81.9 78.3 75.4 68.6 62.9 74.6 81.3 77.8 75.9 66.4 59.5 70.7 26.7 57.4
8B: 85.1 83.1 82.5 81.6 76.2 83.4 85.5 85.6 83.2 79.2 75.9 82.6 30.2 64.7
9B: 84.8 83.7 80.6 69.9 68.5 80.8 86.5 85.2 79.1 64.3 68.3 79.1 27.1 60.7
14B: 85.7 84.7 83.1 83.7 79.3 83.6 86.7 85.8 83.2 81.1 80.7 83.8 31.6 66.2
38B: 86.7 85.6 84.5 84.8 82.6 85.1 89.0 89.3 87.1 84.6 84.3 87.4 32.4 68.1
78B: 87.2 86.6 85.5 86.5 84.6 86.1 89.4 90.3 88.7 86.1 86.6 88.1 32.5 68.9
"""),
    together=tuple(
        tuple(f"{name} {language}" for language in _LANGUAGES) for name in ("MMMB", "MMBench")
    ),
)
VIDEO = Group(
    "video",
    "Video",
    (
        "Video-MME",
        "Video-MME (subtitles)",
        "MVBench",
        "MMBench-Video",
        "MLVU",
        "LongVideoBench",
        "CG-Bench long",
        "CG-Bench clue",
    ),
    _rows("""
1B: 51.0 53.0 63.1 1.3 53.0 48.1 24.8 39.1 46.9
2B: 58.9 61.4 70.4 1.42 64.2 55.4 30.8 50.7 54.9
8B: 66.3 68.9 75.4 1.69 71.4 58.8 38.6 55.2 61.4
9B: 66.7 68.9 74.3 1.69 70.8 62.5 41.1 58.0 62.3
14B: 70.4 73.0 76.6 1.73 73.3 63.9 44.1 60.6 64.9
38B: 72.7 75.0 76.9 1.81 77.8 67.3 46.9 62.8 67.5
78B: 72.7 75.7 78.7 1.81 79.5 65.7 48.4 65.3 68.3
"""),
    scales={"MMBench-Video": 0.03},
)
SPATIAL = Group(
    "spatial",
    "Spatial (VSI-Bench)",
    (
        "VSI count",
        "VSI abs. distance",
        "VSI object size",
        "VSI room size",
        "VSI rel. distance",
        "VSI rel. direction",
        "VSI route",
        "VSI order",
    ),
    _rows("""
8B: 68.1 39.0 48.4 33.6 48.3 36.4 27.3 35.4 42.1
38B: 71.7 50.2 46.1 41.7 53.5 38.6 28.9 60.7 48.9
78B: 71.2 53.7 44.4 39.5 55.9 39.5 28.9 54.5 48.4
"""),
)
GUI = Group(
    "gui",
    "GUI grounding",
    ("ScreenSpot", "ScreenSpot-V2"),
    _rows("""
8B: 79.5 81.4
38B: 85.6 88.3
78B: 88.7 90.9
"""),
    has_overall=False,
)
GROUPS = {
    group.name: group
    for group in (
        REASONING,
        OCR,
        MULTI_IMAGE,
        REAL_WORLD,
        COMPREHENSIVE,
        HALLUCINATION,
        GROUNDING,
        MULTILINGUAL,
        VIDEO,
        SPATIAL,
        GUI,
    )
}
