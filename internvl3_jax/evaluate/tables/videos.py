"""Videos and VSI-Bench."""

from internvl3_jax.evaluate.task import Task

_FRAMES = (16, 32, 48, 64)  # the card has the best of the four
_BEST = "the card has the best of 16, 32, 48 and 64 frames"


def _video(name: str, column: str, file: str, prompt: str, frames=_FRAMES, **changes) -> Task:
    changes = {"note": _BEST} | changes
    rule = changes.pop("frame_rule", "kit")
    arguments = {"set": prompt} | changes.pop("arguments", {})
    return Task(
        name,
        (column,),
        "video",
        (file,),
        "videos",
        prompt,
        max_tiles=1,
        frames=frames,
        frame_rule=rule,
        arguments=arguments,
        **changes,
    )


VIDEO = [
    _video("videomme", "Video-MME", "Video-MME.tsv", "video_mme", scorer="video_mme"),
    _video(
        "videomme_subtitles",
        "Video-MME (subtitles)",
        "Video-MME.tsv",
        "video_mme",
        scorer="video_mme",
        arguments={"subtitles": True},
    ),
    Task(
        "mvbench",
        ("MVBench",),
        "video",
        ("MVBench/json/*.json",),
        "mvbench",
        "mvbench",
        scorer="mvbench",
        program="own",
        max_tiles=1,
        share="own",
        max_new_tokens=1000,
        frames=(16,),
        frame_rule="mvbench",
    ),
    _video(
        "mmbench_video",
        "MMBench-Video",
        "MMBench-Video.tsv",
        "mmbench_video",
        exact="judge",
        file_name="MMBench-Video",
        file_form="table",
    ),
    _video("mlvu", "MLVU", "MLVU_MCQ.tsv", "mlvu", scorer="mlvu"),
    _video(
        "longvideobench",
        "LongVideoBench",
        "LongVideoBench.tsv",
        "longvideobench",
        scorer="longvideobench",
    ),
    *(
        _video(
            f"cgbench_{kind}",
            f"CG-Bench {kind}",
            "CG-Bench_MCQ_Grounding_Mini.tsv",
            "cgbench",
            (32,),
            scorer="cgbench",
            frame_rule="clues" if kind == "clue" else "kit",
            arguments={"mode": f"{kind}_acc"},
            note="run by the benchmark's authors for the card; here on the kit's mini file",
        )
        for kind in ("long", "clue")
    ),
]
SPATIAL = [
    Task(
        "vsibench",
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
        "spatial",
        ("VSI-Bench.tsv",),
        "videos",
        "vsi",
        scorer="vsi",
        metric="vsi",
        max_tiles=1,
        frames=(64,),
        frame_rule="vsi",
        arguments={"set": "vsi"},
        note="the card's number of frames is open; 64 come near it",
    )
]
