"""The loaders by name."""

from internvl3_jax.evaluate.loaders import kit, mantis, own, requests, videos

LOADERS = {
    "kit": kit.load,
    "videos": videos.load,
    "mvbench": videos.load_mvbench,
    "mantis": mantis.load,
    "vqa": own.load_vqa,
    "pope": own.load_pope,
    "mme": own.load_mme,
    "mmbench": own.load_mmbench,
    "mmiu": own.load_mmiu,
    "mirb": own.load_mirb,
    "refcoco": own.load_refcoco,
    "mmvet2": own.load_mmvet2,
    "mmhal": own.load_mmhal,
    "requests": requests.load,
}
