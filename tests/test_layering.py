"""Which folder may import which: dependencies point one way, from each room to those above it."""

import ast
import pathlib
import re

import networkx

from tests.support.rooms import (
    HIDDEN_IN,
    JAX,
    NEEDS_KIT,
    OPERATIONS,
    PEERS,
    ROOMS,
    RUNS_PEERS,
    WITHOUT_JAX,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "internvl3_jax"

SHIPPED = [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "convert").rglob("*.py"))]
PROGRAMS = [
    path for place in ("*.py", "configs/*.py", "examples/*.py") for path in sorted(ROOT.glob(place))
]


def dotted_name(path: pathlib.Path) -> str:
    """internvl3_jax/data/media/tiles.py -> internvl3_jax.data.media.tiles; a package's __init__.py
    has the package's name.
    """
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted_name(path) for path in SHIPPED}


def imports(path: pathlib.Path) -> list[tuple[str, int, bool]]:
    """All that a file imports: (dotted name of the module, line, whether it happens inside a
    function).
    """
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


def room_of(name: str) -> str:
    """internvl3_jax.data.media.tiles -> data; the package itself -> ""."""
    return name.split(".")[1] if "." in name else ""


def inside(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def package_module(name: str) -> str:
    """The module of the package that an imported name belongs to: the name itself or what holds it."""
    return name if name in MODULES else name.rpartition(".")[0]


def complaints(path: pathlib.Path, allowed) -> list[str]:
    """One line for each import for which `allowed(name, lazy)` gives a reason against it."""
    found = [(line, name, allowed(name, lazy)) for name, line, lazy in imports(path)]
    return [
        f"{path.relative_to(ROOT)}:{line}: imports {name}: {reason}"
        for line, name, reason in found
        if reason
    ]


def is_without_jax(name: str) -> bool:
    return any(inside(name, f"{PACKAGE}.{part}") for part in WITHOUT_JAX)


def package_rule(path: pathlib.Path):
    """What a module of the package may import, as a function from a name to the reason against it
    or None.
    """
    own = dotted_name(path)

    def allowed(name: str, lazy: bool) -> str | None:
        if inside(name, "convert") or inside(name, "configs") or inside(name, "examples"):
            return "the package does without the programs that are built on it"
        if is_without_jax(own) and name.split(".")[0] in JAX:
            return f"{own} does without jax"
        if not inside(name, PACKAGE):
            return None
        module = package_module(name)
        room, other = room_of(own), room_of(module)
        if other not in ROOMS:
            return "not in ROOMS"
        kernels = f"{PACKAGE}.model.ops."
        if (
            module.startswith(kernels)
            and module.removeprefix(kernels) not in OPERATIONS
            and not own.startswith(kernels)
        ):
            return "kernels are reached through model/ops/attention.py"
        if is_without_jax(own) and module != f"{PACKAGE}.{other}" and not is_without_jax(module):
            return f"{own} does without jax, and {module} imports it"
        return (
            None
            if ROOMS.index(other) <= ROOMS.index(room)
            else f"{other} is not above {room} in ROOMS"
        )

    return allowed


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in MODULES if inside(module, PACKAGE)} - {""} == set(ROOMS)


def test_modules_import_only_from_rooms_above():
    """The package's own __init__.py is exempt: it offers the rest to users."""
    paths = [path for path in SHIPPED if inside(dotted_name(path), PACKAGE)]
    paths = [path for path in paths if dotted_name(path) != PACKAGE]
    assert [complaint for path in paths for complaint in complaints(path, package_rule(path))] == []


def test_no_circle():
    """No module imports itself through others, function-level imports included."""
    graph = networkx.DiGraph()
    for path in SHIPPED:
        if dotted_name(path) != PACKAGE:  # its __init__.py offers the rest to users
            targets = {package_module(name) for name, *_ in imports(path)} & MODULES
            graph.add_edges_from((dotted_name(path), target) for target in targets)
    assert [
        circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1
    ] == []


def test_no_peer_is_imported():
    def allowed(name: str, lazy: bool) -> str | None:
        return "only in tests/ and benchmarks/" if name.split(".")[0] in PEERS else None

    def allowed_lazily(name: str, lazy: bool) -> str | None:
        return None if lazy else allowed(name, lazy)

    runs_peers = f"{PACKAGE}.{RUNS_PEERS}"
    assert [
        complaint
        for path in [*SHIPPED, *PROGRAMS]
        for complaint in complaints(
            path, allowed_lazily if dotted_name(path) == runs_peers else allowed
        )
    ] == []


def test_kits_are_imported_in_their_modules_only():
    """Elsewhere inside functions, which run where the kit is."""
    for kit in set(NEEDS_KIT.values()):
        own = {f"{PACKAGE}.{name}" for name, needed in NEEDS_KIT.items() if needed == kit}

        def allowed(name: str, lazy: bool, kit=kit, own=own) -> str | None:
            return f"only in {own}" if inside(name, kit) and not lazy else None

        paths = [path for path in SHIPPED if dotted_name(path) not in own]
        assert [complaint for path in paths for complaint in complaints(path, allowed)] == []


def test_no_test_module_is_imported():
    """Test modules share code through tests/support and fixtures through conftest.py, and a test
    module without its own imports can be split or removed.
    """

    def allowed(name: str, lazy: bool) -> str | None:
        shared = any(part.startswith("test_") for part in name.split(".")[:2])
        return "what tests share is in tests/support or conftest.py" if shared else None

    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert [complaint for path in paths for complaint in complaints(path, allowed)] == []
    # an import that is unused but for its effect on pytest is a fixture's
    ignored = re.compile(r"# noqa: F(401|811)")
    assert [path.name for path in paths if ignored.search(path.read_text(encoding="utf-8"))] == []


def test_libraries_stay_in_their_room():
    def rule(path: pathlib.Path):
        def allowed(name: str, lazy: bool) -> str | None:
            owners = [owner for library, owner in HIDDEN_IN.items() if inside(name, library)]
            own = dotted_name(path)
            return (
                None
                if not owners or any(inside(own, f"{PACKAGE}.{owner}") for owner in owners)
                else f"only in {owners[0]}"
            )

        return allowed

    assert [complaint for path in SHIPPED for complaint in complaints(path, rule(path))] == []


def test_the_rules_see_what_they_should(tmp_path, monkeypatch):
    """Each kind of forbidden import is noticed, however it is written."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    forbidden = {
        "model/internvl.py": [
            "from internvl3_jax.checkpoints.checkpoint import load",
            "from ..inference import generator",
            "def f():\n    import internvl3_jax.training.step",
            "import internvl3_jax",
            "import convert",
            "from internvl3_jax.model.ops.splash_attention import kernel",
            "from internvl3_jax.model.ops import splash_attention",
            "from .ops import splash_attention",
        ],
        "positions.py": ["import jax.numpy as jnp", "from internvl3_jax.model import internvl"],
        "data/media/tiles.py": [
            "def f():\n    from internvl3_jax.checkpoints.hf.config import from_hf",
            "from ...model.vision import VisionTower",
            "import jax",
        ],
        "checkpoints/checkpoint.py": [
            "from convert.open import open_model",
            "import examples.demo",
        ],
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
# A folder that only its author has, at the start of an absolute path; nobody's clone is beside a
# folder named shared.
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
    assert [path.stem for path in paths] == [
        "constraints-3.11",
        "constraints-3.12",
        "constraints-3.13",
    ]
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [
            line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)
        ] == []
