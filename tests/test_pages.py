"""README.md, CONTRIBUTING.md, SECURITY.md and docs/: every link and every named file exists, prose
keeps to 100 columns, the website shows every page, and the drawn figure is up to date.
"""

import ast
import importlib
import posixpath
import re
import sys

import pytest

from tests.support.documents import FENCE, ROOT, pages

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
# A file of the repository in `code`: with its path from the root, or from internvl3_jax/.
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|md|ipynb|csv|yaml|txtpb))`")
ROOTS = (ROOT, ROOT / "internvl3_jax", ROOT / "internvl3_jax" / "model")
COLUMNS = 100

pytestmark = pytest.mark.smoke


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """Anchors of the page's headings, by GitHub's rule."""
    titles = [title.lower() for title in HEADING.findall(FENCE.sub("", read(page)))]
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    """Links to pages, sections, images and other files of the repository."""
    for link in LINK.findall(FENCE.sub("", read(page))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (
            posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        )
        assert (ROOT / path).exists(), f"{page}: {link}: there is no {path}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {link}: {path} has no such heading"


@pytest.mark.parametrize("page", pages())
def test_named_files_exist(page):
    folders = {path.name for root in ROOTS for path in root.iterdir() if path.is_dir()}
    for path in FILE.findall(FENCE.sub("", read(page))):
        if path.split("/")[0] in folders:
            assert any((root / path).exists() for root in ROOTS), f"{page}: there is no {path}"


@pytest.mark.parametrize("page", pages())
def test_prose_keeps_to_100_columns(page):
    """Tables and rows of JSONL excepted: they cannot be wrapped."""
    long = [
        f"{page} line {number}: {len(line)} columns"
        for number, line in enumerate(read(page).splitlines(), 1)
        if len(line) > COLUMNS and not line.lstrip().startswith(("|", '{"'))
    ]
    assert long == []


def test_messages_of_the_troubleshooting_page_exist():
    """What the first column quotes is in the programs, names and numbers left out."""
    programs = [*ROOT.glob("*.py"), *ROOT.glob("convert/*.py"), *ROOT.glob("internvl3_jax/**/*.py")]
    texts = "\n".join(
        node.value
        for path in programs
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = re.findall(r"^\| (.*?) \|", read("docs/troubleshooting.md"), re.M)[1:]
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    quoted.remove("RESOURCE_EXHAUSTED")  # of XLA
    assert len(quoted) >= 10
    for text in quoted:
        for fragment in re.split(r"\bX\b|\.\.\.|\d+|;", text):
            assert fragment.strip() in texts, f"no program says {fragment.strip()!r}"


def test_the_index_and_the_website_have_every_page():
    names = {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")}
    names.remove("README.md")
    assert names <= set(LINK.findall(read("docs/README.md")))
    navigation = read("mkdocs.yml").split("\nnav:\n")[1]
    listed = re.findall(r": (\S+\.md)", navigation)
    assert sorted(listed) == sorted(names | {"index.md", "contributing.md", "security.md"})


def test_the_figure_of_the_data_flow_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    figure = importlib.import_module("draw_dataflow")
    sys.modules.pop("draw_dataflow")
    assert figure.PATH.read_text(encoding="utf-8") == figure.draw(), "run tools/draw_dataflow.py"
    for _, _, path in (*figure.VISION_STEPS, *figure.TEXT_STEPS):
        assert (ROOT / "internvl3_jax" / path).exists()
