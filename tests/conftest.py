"""Settings of every test: the CPU as eight devices, no network, no implicit rank promotion, quick
compilation, and a cache of compiled programs that is kept between runs.
"""

import gc
import os
import shutil
import time

from tests.support import compilation_cache

# Environment variables, so that programs started by a test get them too; set before anything
# imports jax, PyTorch or transformers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# PyTorch's models are tiny here: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Most programs run once or twice: optimizing them takes longer than running them.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache.FOLDER))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

gc.set_threshold(20_000, 20, 20)  # tracing makes many objects and few cycles
jax.config.update("jax_num_cpu_devices", 8)  # in this process only
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files that train, start programs or compile large ones, longest first: they begin first, so that
# none is left for one worker at the end, and `make test-fast` does without them.
SLOW = """
documented_commands install train train_refused train_hosts agreed_step pairs_run object_storage
lora_run lora_base pairs generate generate_ends engine engine_settings engine_models engine_hosts
elastic sharding attention attention_meshes step benchmarks infer_hosts distributed optimizer
experts_training prompt_lookup frozen infer infer_requests lora chat_session chat_turns
chat_requests chat_video infer_media thinking peft peft_refused critic best_of_n preference
preference_example process_reward process_labels make_pairs miniature digits notebook fit
fit_memory fit_compiled fit_lora gpu_benchmark evaluate_run evaluate_hosts parity_engines
documented_names quantize weights stored_weights quality int8_cache internlm2 serve serve_engine
serve_hosts web serve_process serve_documented serve_load serve_streams serve_ends serve_grammar
fuzz convert compose convert_damage convert_sources sampling shapes launch launch_clusters kill
""".split()
# Their commands need more than the tests' environment.
OTHER_COMMANDS = {"torchvision", "tpu_compiler", "trl", "docs", "install", "gpu", "serve_load"}
OTHER_COMMANDS |= {"browser", "kits", "slow"}


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if item.path.stem not in order and not marks & OTHER_COMMANDS:
            item.add_marker("fast")


def pytest_ignore_collect(collection_path, config):
    """Skips files without a smoke test under -m smoke: many import PyTorch, which the smoke
    environments lack.
    """
    if config.option.markexpr == "smoke" and collection_path.suffix == ".py":
        return "mark.smoke" not in collection_path.read_text() or None
    return None


def pytest_sessionstart(session):
    session.began = time.time()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        compilation_cache.begin()


def pytest_sessionfinish(session):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        compilation_cache.end(since=session.began)


def pytest_collection_finish(session):
    """Exempts what the test modules imported from garbage collection: PyTorch, transformers and
    jax are millions of objects, and loading a checkpoint collects several times.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compiles quickly, but in tests marked `optimized` as users do."""
    quick = item.get_closest_marker("optimized") is None
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops compiled programs after each file: each holds memory maps, of which Linux allows a
    process 65,530.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def ask(capsys):
    """Runs infer.py in this process with flags by name; returns (stdout, stderr)."""
    from absl.testing import flagsaver

    import infer
    from tests.support import tiny_checkpoint

    def call(*, arguments=(), **values):
        infer.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver():
            infer.FLAGS.unparse_flags()
            infer.FLAGS.mark_as_parsed()
            settings = {
                "checkpoint": str(tiny_checkpoint.directory()),
                "compilation_cache": "",
                "max_new_tokens": 12,
            }
            for name, value in (settings | values).items():
                setattr(infer.FLAGS, name, value)
            infer.run(["infer.py", *arguments])
        return capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def lora_base(tmp_path_factory):
    """The tiny checkpoint as the frozen base of LoRA runs."""
    from tests.support import tiny_checkpoint

    return shutil.copytree(tiny_checkpoint.directory(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def lora_run(lora_base, tmp_path_factory):
    """(workdir, parameters at the end) of a short LoRA run."""
    from tests.support import lora_setup

    workdir = tmp_path_factory.mktemp("run") / "run"
    params = lora_setup.start(lora_setup.config_of(lora_base), workdir)
    return workdir, jax.device_get(params)


@pytest.fixture(scope="module")
def qwen_directory(tmp_path_factory):
    """The files of Qwen2.5's tokenizer with InternVL's tokens."""
    from tests.support import qwen_tokenizer

    return qwen_tokenizer.write_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def tokenizer(qwen_directory):
    from internvl3_jax.data.text.tokenizer import Tokenizer

    return Tokenizer.from_directory(qwen_directory)


@pytest.fixture(scope="module")
def transformers_tokenizer(qwen_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_directory)


@pytest.fixture
def stubs(tmp_path):
    """Call with programs and what each does in bash: they are first on the returned environment's
    PATH and note their calls.
    """

    def make(**programs):
        for name, body in programs.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            note = f"{{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }} >> {tmp_path}/calls"
            path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
            path.chmod(0o755)
        return os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    make.notes = tmp_path / "calls"
    make.calls = lambda: [
        call.split("\x1f")[:-1] for call in (tmp_path / "calls").read_text().split("\x1e")[:-1]
    ]
    return make


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A directory with wide.png (three tiles and a thumbnail) and small.png (one tile)."""
    from tests.support import tiny_checkpoint

    directory = tmp_path_factory.mktemp("image_folder")
    tiny_checkpoint.make_image(40, 16, 1).save(directory / "wide.png")
    tiny_checkpoint.make_image(16, 16, 2).save(directory / "small.png")
    return directory


@pytest.fixture
def place(tmp_path):
    """A root with an image, a link, and a neighbor whose name begins with the root's."""
    from tests.support.official_data import make_image

    for folder in ("root", "root/sub", "root2", "else"):
        (tmp_path / folder).mkdir()
    for name in ("root/a.png", "root/sub/b.png", "root2/a.png", "secret.png", "else/c.png"):
        make_image(20, 20).save(tmp_path / name)
    (tmp_path / "root/link").symlink_to(tmp_path / "else")
    (tmp_path / "root/frames").mkdir()
    make_image(20, 20).save(tmp_path / "root/frames/0.png")
    return tmp_path


@pytest.fixture
def bounded_memory():
    """What is claimed must not be allocated."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def chat():
    """One `Chat` serves all tests; what they do to it is undone."""
    from tests.support import chat_setup

    chat = chat_setup.shared()
    options = chat.options
    chat.reset()
    yield chat
    chat.options = options
