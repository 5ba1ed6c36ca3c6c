"""MkDocs hook: pages of the repository outside docs/ join the site, and links between pages hold in both places.

README.md is the site's front page. Links are written for a reader of the repository (`docs/data.md` in README.md,
`../benchmarks/RESULTS.md` in docs/); here they become links between pages of the site. A link to a file that is not a
page becomes its path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {  # path in the repository -> path in the site
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/ that exist."""
    for source, target in OUTSIDE.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between files of the repository to links between pages of the site."""
    here = page.file.src_uri
    source = next((path for path, target in OUTSIDE.items() if target == here), f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None and (ROOT / path).exists():
            return text if text.startswith("`") else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(rewrite, markdown)
