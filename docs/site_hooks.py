"""Pages and pictures of the site that live elsewhere in the repository, at one place each.

A page of docs/ links to them by their path in the repository (``../bench/results/x.png``), as is
right on GitHub; in the site they lie under the same path, beside the pages of docs/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/results/*.md", "bench/results/*.png")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links from repository paths to paths in the site; keeps "0.148 ± 0.003" on one line."""
    markdown = markdown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    uri = page.file.src_uri
    if (ROOT / uri).exists():  # from outside of docs/
        return re.sub(r"\]\(docs/", "](", markdown)
    up = "../" * uri.count("/")
    return re.sub(rf"\]\({re.escape(up)}\.\./(?!\.\.)", f"]({up}", markdown)
