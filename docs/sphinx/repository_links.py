"""Links to the repository's own pages lead to their copies on the site: `../RESULTS.md` to `project/results`.

In the repository the pages link each other by their paths, as GitHub shows them. Some of them lie outside of
docs; a page in docs/project includes each.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PROJECT_PAGES = {
    "RESULTS.md": "project/results.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "benchmarks/results/kernels.md": "project/kernels.md",
}
"""Pages outside of docs, by their path in the repository, and the pages of docs that include them."""

LINK = re.compile(r"\]\(([\w./-]+\.md)(#[^)\s]*)?\)")


def redirect(text: str, source: str, shown: str) -> str:
    """Return a page's text with its links to pages of the repository as the site has them.

    Args:
        text: the page, in Markdown.
        source: the folder that its links start from, in the repository.
        shown: the folder that the page is shown in, below docs.
    """

    def target(link: re.Match[str]) -> str:
        path = os.path.normpath(f"{source}/{link[1]}")
        page = PROJECT_PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        return f"]({os.path.relpath(page, shown or '.')}{link[2] or ''})" if page else link[0]

    return LINK.sub(target, text)


def _redirect_page(app: Sphinx, name: str, content: list[str]) -> None:
    folder = str(Path(name).parent)
    content[0] = redirect(content[0], f"docs/{folder}", folder)


def _redirect_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    content[0] = redirect(content[0], f"docs/{path.parent}", "project")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _redirect_page)
    app.connect("include-read", _redirect_included)
    return {"parallel_read_safe": True}
