"""Several images, real world, comprehensive, hallucination."""

from internvl3_jax.evaluate.tables.forms import options, own

MULTI_IMAGE = [
    options("blink", "BLINK", "multi_image", "BLINK"),
    own(
        "mantis",
        "Mantis",
        "multi_image",
        "mantis_eval/test*.parquet",
        "mantis",
        "mantis",
        scorer="mantis",
        max_new_tokens=50,
        note="needs pyarrow",
    ),
    own(
        "mmiu",
        "MMIU",
        "multi_image",
        "mmiu/mmiu.jsonl",
        "mmiu",
        "mmiu",
        scorer="option_first",
        metric="mmiu",
        max_tiles=12,
        max_new_tokens=100,
    ),
    options("muirbench", "MuirBench", "multi_image", "MUIRBench", prompt="muirbench"),
    options(
        "mmt",
        "MMT-Bench",
        "multi_image",
        "MMT-Bench_VAL",
        note="whether the card has this file or MMT-Bench_VAL_MI is open",
    ),
    own(
        "mirb",
        "MIRB",
        "multi_image",
        tuple(
            f"MIRB/{name}.json"
            for name in (
                "food sightseeing codeu plot_code analogy 3d_scene image_jigsaw count attribute "
                "visual_chain arxiv"
            ).split()
        ),
        "mirb",
        "mirb",
        scorer="mirb",
        metric="mirb",
        max_new_tokens=512,
    ),
]
REAL_WORLD = [
    options("realworldqa", "RealWorldQA", "real_world", "RealWorldQA"),
    options(
        "mme_realworld",
        "MME-RealWorld",
        "real_world",
        "MME-RealWorld",
        prompt="mme_realworld",
        scorer="mme_realworld",
        max_tiles=12,
        arguments={"kind": "text", "columns": ("multi-choice options",)},
    ),
    options(
        "wildvision",
        "WildVision",
        "real_world",
        "WildVision",
        prompt="detail",
        scorer="none",
        exact="judge",
        arguments={"kind": "none", "letters": "", "columns": ("claude3_sonnet",)},
        file_name="WildVision",
        file_form="table",
    ),
    options("rbench", "R-Bench", "real_world", "R-Bench-Dis"),
]
COMPREHENSIVE = [
    own(
        "mme",
        "MME",
        "comprehensive",
        tuple(
            f"mme/Your_Results/{name}.txt"
            for name in (
                "OCR artwork celebrity code_reasoning color commonsense_reasoning count existence "
                "landmark numerical_calculation position posters scene text_translation"
            ).split()
        ),
        "mme",
        "own_word",
        scorer="mme",
        metric="mme",
        max_new_tokens=20,
    ),
    *(
        own(
            f"mmbench_{language}",
            f"MMBench {language.upper()}",
            "comprehensive",
            f"mmbench/mmbench_test_{language}_20231003.tsv",
            "mmbench",
            "own_options",
            exact="server",
            max_new_tokens=100,
            arguments={"language": language},
            file_name=f"mmbench_test_{language}_20231003.xlsx",
            file_form="mmbench",
        )
        for language in ("en", "cn")
    ),
    options(
        "mmbench_v11",
        "MMBench v1.1",
        "comprehensive",
        "MMBench_TEST_EN_V11",
        scorer="none",
        exact="server",
        arguments={"kind": "none"},
        file_name="MMBench_TEST_EN_V11.xlsx",
        file_form="table",
    ),
    options(
        "mmvet",
        "MMVet",
        "comprehensive",
        "MMVet",
        prompt="bare",
        scorer="none",
        exact="judge",
        arguments={"kind": "text", "letters": ""},
        file_name="MMVet",
        file_form="table",
    ),
    own(
        "mmvet2",
        "MMVet v2",
        "comprehensive",
        "mm-vet-v2/mm-vet-v2.json",
        "mmvet2",
        "own_detail",
        exact="server",
        max_new_tokens=1000,
        file_name="mm-vet-v2.json",
        file_form="mmvet2",
    ),
    options("mmstar", "MMStar", "comprehensive", "MMStar"),
]
HALLUCINATION = [
    options(
        "hallusionbench",
        "HallusionBench",
        "hallucination",
        "HallusionBench",
        prompt="yes_or_no",
        scorer="hallusion",
        metric="hallusion",
        arguments={"kind": "yes_or_no", "letters": "", "columns": ("l2-category",)},
    ),
    own(
        "mmhal",
        "MMHal",
        "hallucination",
        "mm-halbench/mmhal-bench_with_image.jsonl",
        "mmhal",
        "own_bare",
        exact="judge",
        max_new_tokens=1024,
        file_name="mmhal.json",
        file_form="mmhal",
    ),
    options(
        "crpe",
        "CRPE",
        "hallucination",
        "CRPE_RELATION",
        prompt="bare",
        scorer="crpe",
        metric="crpe",
        arguments={"kind": "text", "letters": "", "columns": ("category",)},
    ),
    own(
        "pope",
        "POPE",
        "hallucination",
        (
            "pope/llava_pope_test.jsonl",
            *(f"pope/coco/coco_pope_{kind}.json" for kind in ("adversarial", "popular", "random")),
        ),
        "pope",
        "own_bare",
        scorer="pope",
        metric="pope",
        max_new_tokens=100,
    ),
]
