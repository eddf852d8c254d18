"""Puts files of the repository into the site, where the pages that link to them find them.

README.md becomes the first page; recipes.md shows every numbered recipe as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINKED = (
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Dockerfile", "compose.yaml",
    "benchmarks/RESULTS.md",
)  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add what README.md and the recipes' page need."""
    files.append(File.generated(config, "index.md", content=_page("README.md")))
    for name in _LINKED:
        if name.endswith(".md"):
            files.append(File.generated(config, name, content=_page(name)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "recipes").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = str(path.relative_to(ROOT))
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "recipes.md", content=_recipes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make links of a page in docs/ to the repository's root lead to the site's."""
    return markdown.replace("](../", "](")


def _page(name: str) -> str:
    """Return a page of the repository as the site needs it, where `docs` is the root."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.replace("](docs/", "](").replace("](../docs/", "](../")


def _recipes() -> str:
    lines = ["# Recipes", "", "Each runs as it is, and a test runs each.", ""]
    for path in sorted((ROOT / "recipes").glob("[0-9]*.py")):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].lstrip('r"').rstrip(".")
        lines += [f"## {title}", "", f"[{path.name}](recipes/{path.name})", "",
                  "```python", text.rstrip(), "```", ""]  # fmt: skip
    return "\n".join(lines)
