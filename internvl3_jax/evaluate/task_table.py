"""The tasks: one row for each column, or set of columns, of the card."""

from collections.abc import Sequence

from internvl3_jax.evaluate.card import GROUPS
from internvl3_jax.evaluate.tables import images, local, places, reading, videos
from internvl3_jax.evaluate.task import Task
from internvl3_jax.io.strict_json import suggestion

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *reading.REASONING,
        *reading.OCR,
        *images.MULTI_IMAGE,
        *images.REAL_WORLD,
        *images.COMPREHENSIVE,
        *images.HALLUCINATION,
        *places.GROUNDING,
        *places.MULTILINGUAL,
        *videos.VIDEO,
        *videos.SPATIAL,
        *places.GUI,
        *local.LOCAL,
    )
}
CARD = "card"


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Returns the tasks of names: of a task, of a group of the card, or "card" for all groups.

    Raises:
      ValueError: a name is unknown.
    """
    found: dict[str, Task] = {}
    for name in names:
        chosen = [
            task
            for task in TASKS.values()
            if name in (task.name, task.group) or (name == CARD and task.group in GROUPS)
        ]
        if not chosen:
            known = [CARD, *GROUPS, *TASKS]
            raise ValueError(
                f"--tasks has {name!r}, which is not a task or group"
                f"{suggestion(name, known) or '; --list shows them'}"
            )
        found |= {task.name: task for task in chosen}
    return list(found.values())


# MD5 of the tables as VLMEvalKit states them (August 2026).
_MD5 = """
MMMU_DEV_VAL 585e8ad75e73f75dcad265dfd0417d64
MMBench_DEV_EN b6caf1133a01c6bb705cf753bb527ed8
MathVista_MINI f199b98e178e5a2a20e7048f5dcb0464
MMBench_DEV_CN 08b8fc3324a5ed74155350f57be69fbd
MathVision 93f6de14f7916e598aa1b7165589831e
MMBench_TEST_EN 6939fadb0ce626fefc0bdc9c64efc528
MathVision_MINI 060fe4fa5d868987ce179307bd5f8a33
MMBench_TEST_CN 7e1239baf0ee4c8b513e19705a0f317e
MathVerse_MINI_Vision_Only 68a11d4680014ac881fa37adeadea3a4
MMBench_DEV_EN_V11 30c05be8f2f347a50be25aa067248184
DynaMath b8425ad9a7114571fc9366e013699494
MMBench_TEST_EN_V11 8d1a704e791df6f5d9fb3ef782b65365
WeMath b5e969a075f01290a542411fb7766388
MMVet 748aa6d4aa9d4de798306a63718455e3
LogicVista 41c5d33adf33765c399e0e6ae588c061
MMStar e1ecd2140806c1b1bbf54b43372efb9e
AI2D_TEST 0f593e0d1c7df9a3d69bf1f947e71975
HallusionBench 0c23ac0dc9ef46832d7a24504f2a0c7c
AI2D_TEST_NO_MASK fd8f463634d4fe9fbd23b876e8eea5be
CRPE_RELATION bad7094cde0b572288f4b119c2d0c656
ChartQA_TEST c902e0aa9be5582a7aad6dcf52734b42
POPE c12f5acb142f2ef1f85a26ba2fbe41d5
TextVQA_VAL b233b31f551bbf4056f2f955da3a92cd
MME b36b43c3f09801f5d368627fb92187c3
DocVQA_VAL d5ee77e1926ff10690d469c56b73eabf
MMMB_en 1cd781a71ec5a2983c090b84105d6a01
DocVQA_TEST 6a2f28cac26ef2d3447374e8c6f6c8e9
MMMB_cn 13ed82fa89730037292fcaa27f08f430
InfoVQA_VAL 2342e9c225222f0ef4dec545ebb126fe
MMMB_pt 548ea2b3bb2da991790386f0015d30d1
InfoVQA_TEST df535bf51b88dc9718252c34131a6227
MMMB_ar f3a18b6385f1d9701840aa42de27aead
OCRBench e953d98a987cc6e26ef717b61260b778
MMMB_tr 0733739d43090327975294292bc5cd67
SEEDBench2_Plus e32d3216dc4f452b0fe497a52015d1fd
MMMB_ru ce1cc8a0533425ab0d86b326ebfc2984
CharXiv_descriptive_val 8507c3740f8ddaedcb6b5c1cfcb3fa06
MMBench_dev_en d9ab776fc018b3d45785e9a5c23431c2
CharXiv_reasoning_val 6fc1a522ad32c2e3d72a89857b8cf10b
MMBench_dev_cn 2ed5135326fed02c8e51ea50dda8222f
VCR_EN_EASY_ALL 8a9b96885f251d1c85f42f84073327f1
MMBench_dev_pt 4ddfbcd27ef12444b908c03831cd0295
VCR_EN_EASY_500 fd9258db52f8685dc710619a0ea0a261
MMBench_dev_ar 4271b4a0d0200e1a86380a878e0d64a4
BLINK d5e8af148b10ac69f535ff7b23f3f989
MMBench_dev_tr 4fab39d501389d3d6cc90264bb708f11
MUIRBench 2e5e6fd7699761b08a7cb3ab8c0c2ec8
MMBench_dev_ru 5ba1171ff2e68f80637bf78349e402a5
MMT-Bench_VAL 8dd4b730f53dbf9c3aed90ca31c928e0
MTVQA_TEST d87c17dbab934b7cd89c0a3c1c5657f4
MMT-Bench_VAL_MI c7d7b998eb5cd9aa36c7d4f721472462
Video-MME 85bdd91f9b29a99354c23b97ab7c113c
RealWorldQA 4de008f55dc4fd008ca9e15321dc44b7
MVBench fd21d36522cdedd46d84dc46715ad832
MME-RealWorld fd341132362fc41e707cb37ee6e4dcda
MMBench-Video 98f7df3eb1007fc375ea6fe88a98e2ff
WildVision b38f80156d49411c594772866b0d0b52
MLVU_MCQ bb5c37e7cf8d43fc9a25c23d2b4633f5
R-Bench-Dis d6e961dbfc43350688af2560226830b4
LongVideoBench 82905eae3a5ae7383c5a8ee9655e1ab9
RefCOCO f50ca356638ddac89b309311fd876a5d
CG-Bench_MCQ_Grounding_Mini 54ed3e90a51a6fb375c92b319a715f72
ScreenSpot_Mobile a5b5299843a75c9b9574c47bc13b2c53
ScreenSpot_v2_Mobile 234c858ab4f0e787e8388a73df65a4b7
ScreenSpot_Desktop e6e7bac21b6b2475276404fce2458132
ScreenSpot_v2_Desktop 5f2aa2a497327bd33b2512a0c75cf994
ScreenSpot_Web e51d168c14b8582427cf3107d236cfc5
ScreenSpot_v2_Web 01cd0877ee1b735a6d5190b053ba9482
VSI-Bench 34544fd83241391d83eff087a1be7d83
"""
KNOWN_MD5 = {f"{name}.tsv": digest for name, digest in map(str.split, _MD5.strip().splitlines())}
