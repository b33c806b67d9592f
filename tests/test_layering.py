"""Who may import whom. A new module of the package takes its row in ROWS; a module imports only from the rows above its own."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "internvl3_jax"

# A folder is one unit: its files may import each other.
ROWS = [
    ["expressions", "file_errors", "terminal"],
    ["orbax_s3", "remote_files"],
    ["safe_files"],
    ["model_files", "strict_json"],
    ["typed"],
    ["limits"],
    ["command_line"],
    ["jsonl"],
    ["integrity"],
    ["unfinished"],
    ["config", "find", "hf_fields", "host_flags", "patterns", "prompts", "requests", "verify"],
    ["answer_file", "hf_language", "positions", "settings", "sizes"],
    ["hf_config"],
    ["data", "environment", "hardware", "peers", "sharding", "storage"],
    ["cache", "checksum", "distributed", "fingerprint", "flops", "given_images", "ops", "placement", "reader", "report"],
    ["manifest", "projector", "verification", "vision", "language"],
    ["steps"],
    ["lora", "model"],
    ["adapters"],
    ["checkpoint", "losses", "optimizer", "preference", "sampling"],
    ["checks", "components", "generate", "meter"],
    ["objective", "options"],
    ["train_step"],
    ["start"],
    ["workdir"],
    ["chat", "critic", "evaluate", "loading", "fit", "held_out", "questions", "reference", "run", "tokens"],
    ["best_of_n", "conversation", "make_pairs", "make_process_labels", "make_reference"],
    ["answer_flags", "answering"],
]
ROW = {unit: number for number, row in enumerate(ROWS) for unit in row}

# Host code: worker processes of the data pipeline import it, and none of them may start an accelerator.
WITHOUT_JAX = {
    "answer_file",
    "config",
    "data",
    "find",
    "fingerprint",
    "hf_config",
    "hf_fields",
    "hf_language",
    "host_flags",
    "positions",
    "prompts",
    "requests",
    "sizes",
}
WITHOUT_JAX |= {"file_errors", "remote_files"}
WITHOUT_JAX |= {
    "command_line",
    "expressions",
    "jsonl",
    "model_files",
    "safe_files",
    "strict_json",
    "terminal",
    "tokens",
    "verify",
}
WITHOUT_JAX |= {"integrity", "limits", "settings", "typed", "unfinished"}
JAX = {"chex", "flax", "jax", "jaxlib", "optax", "orbax"}
# Narrower than the rows.
FOUNDATION = {"command_line", "file_errors", "remote_files", "jsonl", "model_files", "safe_files", "strict_json", "terminal"}
ONLY = {"data": {"config", "find", "positions"} | FOUNDATION, "tokens": {"config", "data", "positions", "sizes"} | FOUNDATION}
CONVERT_MAY = FOUNDATION | {
    "adapters",
    "checkpoint",
    "config",
    "data",
    "find",
    "fingerprint",
    "hf_config",
    "hf_language",
    "lora",
    "manifest",
    "model",
    "storage",
    "verification",
}
# Modules of ops/ that the models call; any other is a kernel, which ops/attention.py picks.
OPERATIONS = {"ops", "ops.attention", "ops.context", "ops.dense", "ops.norms", "ops.quantize", "ops.remat", "ops.rope"}
# Libraries that one unit hides from the rest.
HIDDEN_IN = {
    "orbax": "storage",
    "orbax.checkpoint._src": "orbax_s3",
    "grain": "data",
    "jax.experimental.pallas": "ops",
    "qwix": "ops",
}
# In tests/ and benchmarks/ only.
PEERS = {"torch", "torchvision", "transformers", "accelerate", "peft"}

SHIPPED = [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "convert").rglob("*.py"))]
PROGRAMS = [path for place in ("*.py", "configs/*.py", "examples/*.py") for path in sorted(ROOT.glob(place))]


def dotted_name(path: pathlib.Path) -> str:
    """internvl3_jax/data/tiles.py -> internvl3_jax.data.tiles; a package's __init__.py has the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted_name(path) for path in SHIPPED}


def imports(path: pathlib.Path) -> list[tuple[str, int, bool]]:
    """All that a file imports: (dotted name of the module, line, whether it happens inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{absolute(node, path)}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, id(node) in lazy) for name in names]
    return found


def absolute(node: ast.ImportFrom, path: pathlib.Path) -> str:
    """The module that `from ... import` names, with leading dots resolved."""
    if not node.level:
        return node.module
    package = path.relative_to(ROOT).parts[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def unit_of(name: str) -> str:
    """internvl3_jax.data.tiles -> data; the package itself -> ""."""
    return name.split(".")[1] if "." in name else ""


def inside(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def package_module(name: str) -> str:
    """The module of the package that an imported name belongs to: the name itself or what holds it."""
    return name if name in MODULES else name.rpartition(".")[0]


def complaints(path: pathlib.Path, allowed) -> list[str]:
    """One line for each import for which `allowed(name, lazy)` gives a reason against it."""
    found = [(line, name, allowed(name, lazy)) for name, line, lazy in imports(path)]
    return [f"{path.relative_to(ROOT)}:{line}: imports {name}: {reason}" for line, name, reason in found if reason]


def package_rule(path: pathlib.Path):
    """What a module of the package may import, as a function from a name to the reason against it or None."""
    unit = unit_of(dotted_name(path))

    def allowed(name: str, lazy: bool) -> str | None:
        if inside(name, "convert"):
            return None if unit == "checkpoint" and lazy else "only checkpoint.py may use convert/, and only inside a function"
        if unit in WITHOUT_JAX and name.split(".")[0] in JAX:
            return f"{unit} does without jax"
        if not inside(name, PACKAGE):
            return None
        module = package_module(name)
        other = unit_of(module)
        if other not in ROW:
            return "not a module in ROWS"
        if inside(module, f"{PACKAGE}.ops") and module.removeprefix(f"{PACKAGE}.") not in OPERATIONS and unit != "ops":
            return "kernels are reached through ops/attention.py"
        if other == unit:
            return None
        if unit in ONLY and other not in ONLY[unit]:
            return f"{unit} may import only {', '.join(sorted(ONLY[unit]))}"
        if unit in WITHOUT_JAX and other not in WITHOUT_JAX:
            return f"{unit} does without jax, and {other} imports it"
        return None if ROW[other] < ROW[unit] else f"{other} is not in a row above {unit}"

    return allowed


def convert_rule(name: str, lazy: bool) -> str | None:
    if not inside(name, PACKAGE):
        return None
    unit = unit_of(package_module(name))
    return None if unit in CONVERT_MAY else f"convert/ may import only {', '.join(sorted(CONVERT_MAY))}"


def test_every_module_has_one_row():
    units = {unit_of(module) for module in MODULES if inside(module, PACKAGE)} - {""}
    assert sorted(units - set(ROW)) == [], "new modules: give them a row in ROWS"
    assert len(ROW) == sum(map(len, ROWS)), "a module is in two rows"


@pytest.mark.parametrize("path", SHIPPED, ids=dotted_name)
def test_modules_import_only_from_rows_above(path):
    name = dotted_name(path)
    if inside(name, "convert"):
        assert complaints(path, convert_rule) == []
    elif name != PACKAGE:  # its __init__.py offers the rest to users
        assert complaints(path, package_rule(path)) == []


@pytest.mark.parametrize("path", [*SHIPPED, *PROGRAMS], ids=dotted_name)
def test_no_peer_is_imported(path):
    assert complaints(path, lambda name, lazy: "only in tests/ and benchmarks/" if name.split(".")[0] in PEERS else None) == []


@pytest.mark.parametrize("path", SHIPPED, ids=dotted_name)
def test_libraries_stay_behind_their_module(path):
    def allowed(name: str, lazy: bool) -> str | None:
        owners = [owner for library, owner in HIDDEN_IN.items() if inside(name, library)]
        return None if unit_of(dotted_name(path)) in owners or not owners else f"only in {owners[0]}"

    assert complaints(path, allowed) == []


def test_the_rules_see_what_they_should(tmp_path, monkeypatch):
    """Each kind of forbidden import is noticed, however it is written."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "MODULES", {f"{PACKAGE}.{unit}" for unit in ROW} | {f"{PACKAGE}.ops.splash", PACKAGE})
    forbidden = {
        "model.py": [
            "from internvl3_jax.checkpoint import load",
            "from . import generate",
            "import internvl3_jax",
            "import convert",
        ],
        "positions.py": ["import jax.numpy as jnp", "from internvl3_jax import model"],
        "vision.py": [
            "from internvl3_jax.ops.splash import kernel",
            "from internvl3_jax.ops import splash",
            "from .model import InternVL",
        ],
        "data/tiles.py": ["def f():\n    from internvl3_jax.hf_config import from_hf", "from ..vision import VisionTower"],
        "checkpoint.py": ["from convert.source import open_released"],
    }
    for name, lines in forbidden.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in lines:
            path.write_text(line)
            assert complaints(path, package_rule(path)), f"{name}: {line}"


TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".sh", ".cfg", ".yaml", ".yml", ""}
GENERATED = re.compile(
    r"^(\.git|\.venv.*|\..*_cache|\.ipynb_checkpoints|__pycache__|.*\.egg-info|build|dist|runs|checkpoints|demo_output)$"
)
# A folder that only its author has, at the start of an absolute path; nobody's clone lies beside a folder named shared.
PRIVATE = re.compile(r"(?<![\w.~$}>])/(?:work|root|home|Users|opt|tmp/dev)/\w|\.\./shared/")


def text_files(folder: pathlib.Path):
    for path in sorted(folder.iterdir()):
        if GENERATED.match(path.name):
            continue
        if path.is_dir():
            yield from text_files(path)
        elif path.suffix in TEXT:
            yield path


def test_no_file_names_its_authors_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files(ROOT)
        if path != pathlib.Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert found == []


def test_constraints_are_names_and_versions_only():
    """No address of a registry, no local build tag, no file of the machine that resolved them."""
    paths = sorted((ROOT / "requirements").glob("constraints-*.txt"))
    assert [path.stem for path in paths] == ["constraints-3.11", "constraints-3.12", "constraints-3.13"]
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)] == []
