"""The sizes and the English that CONTRIBUTING.md asks for: lines, files, functions, docstrings."""

import ast
import pathlib
import re

from tests.support.documents import ROOT

CODE = ("*.py", "benchmarks", "configs", "convert", "examples", "internvl3_jax", "tests", "tools")
# A docstring that begins so says what something is about instead of what it does or is.
FRAGMENT = re.compile(r"(?:Of|What|Where|Whether|How|Who|That) ")
BRITISH = re.compile(
    r"\b(?:normal|token|initial|optim|serial|minim|maxim|general|special|random|quant|synchron|"
    r"summar|organ|recogn|author|categor|material|visual|parametr|regular|stabil|util)"
    r"is(?:e|es|ed|ing|er|ation)\b|\b(?:colour|behaviour|neighbour|favour|licence|labelled|labelling)",
    re.I,
)


def paths(*folders: str) -> list[pathlib.Path]:
    """Returns the Python files of folders and patterns."""
    found = [
        path for name in folders for path in ROOT.glob(name if "*" in name else f"{name}/**/*.py")
    ]
    return sorted(found)


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_lines_keep_to_100_columns():
    lines = [len(line) for path in paths(*CODE) for line in path.read_text().splitlines()]
    assert share([length > 100 for length in lines]) < 0.02


def test_files_have_at_most_350_lines():
    lengths = {str(path): len(path.read_text().splitlines()) for path in paths(*CODE)}
    assert [f"{path}: {lines}" for path, lines in lengths.items() if lines > 350] == []


def test_functions_have_at_most_60_lines():
    """At most 3 % are longer: kernels, and tables written as functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths(*CODE)]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    assert share([node.end_lineno - node.lineno >= 60 for node in functions]) < 0.03


def docstrings(path: pathlib.Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]


def test_docstrings_begin_with_what_something_does_or_is():
    files = paths("*.py", "configs", "convert", "internvl3_jax")
    assert [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in files
        for text in docstrings(path)
        if FRAGMENT.match(text)
    ] == []


def test_spelling_is_american():
    """In docstrings and pages; tables and prompts of benchmarks keep the words of their authors."""
    pages = {page: [page.read_text(encoding="utf-8")] for page in ROOT.glob("docs/*.md")}
    texts = pages | {path: docstrings(path) for path in paths(*CODE)}
    assert [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, parts in texts.items()
        for part in parts
        for match in BRITISH.finditer(part)
    ] == []
