"""Puts files of the repository into the site, at the paths they have there.

README.md becomes the first page; docs/ is the site's root. Links are written for the repository, as
GitHub resolves them, and are rewritten here.
"""

from __future__ import annotations

import re
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINKED = (
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Dockerfile", "compose.yaml",
    "benchmarks/RESULTS.md",
)  # fmt: skip
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")


def on_files(files: Files, config: Any) -> Files:
    """Add README.md and the files that pages link to."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    recipes = [path for path in sorted((ROOT / "recipes").rglob("*")) if path.is_file()]
    for path in [*(ROOT / name for name in _LINKED), *recipes]:
        if "__pycache__" not in path.parts and path.name != "README.md":
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "recipes/README.md", content=_recipes()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    in_docs = (ROOT / "docs" / here).exists()
    source = "README.md" if here == "index.md" else f"docs/{here}" if in_docs else here

    def on_site(link: re.Match[str]) -> str:
        target = normpath(PurePosixPath(source).parent / link[0])
        target = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return relpath(target, PurePosixPath(here).parent)

    return _LINK.sub(on_site, markdown)


def _recipes() -> str:
    """Return the table of recipes with every numbered recipe below it."""
    lines = [(ROOT / "recipes/README.md").read_text(encoding="utf-8")]
    for path in sorted((ROOT / "recipes").glob("[0-9]*.py")):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].lstrip('r"').rstrip(".")
        lines += [f"## {title}", "", f"[{path.name}]({path.name})", "",
                  "```python", text.rstrip(), "```", ""]  # fmt: skip
    return "\n".join(lines)
