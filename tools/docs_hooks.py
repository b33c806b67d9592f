"""Hooks of mkdocs (mkdocs.yml): the site has the pages of docs/, README.md as its first page,
CONTRIBUTING.md and SECURITY.md, and every image that they show.

The pages are written for GitHub, with links relative to the repository. Here a link to a page
becomes a link within the site, and an image outside of docs/ is copied. A link to any other file
leads to `repo_url`, or becomes plain text if that is not set.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Files outside of docs/ that are pages, by their names on the site.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)


def on_files(files, config):
    """Adds the pages and images outside of docs/."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    for source in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        for link in LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
            path = in_repository(source, link["target"])
            name = site_path(path)
            if link["image"] and name.startswith("files/") and not files.get_file_from_path(name):
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page, outside of fenced code."""
    name = page.file.src_uri
    source = PAGES.get(name, f"docs/{name}")

    def rewritten(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = in_repository(source, target)
        site = site_path(path)
        if files.get_file_from_path(site):
            relative = posixpath.relpath(site, posixpath.dirname(name) or ".")
            anchor = f"#{anchor}" if anchor else ""
            return f"{match['image']}[{match['text']}]({relative}{anchor})"
        if config.repo_url:
            return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return match["text"]

    out, end = [], 0
    for fence in FENCE.finditer(markdown):
        out += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*out, LINK.sub(rewritten, markdown[end:])])


def in_repository(source: str, target: str) -> str:
    """Returns the path in the repository of a link in the file `source`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target.split("#")[0]))


def site_path(path: str) -> str:
    """Returns the name on the site of a file of the repository, whether the site has it or not."""
    if path == "docs/README.md":
        return "index.md"
    pages = {source: name for name, source in PAGES.items()}
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
