"""Docstrings for the site: the reStructuredText that they use, as the Markdown that it renders.

Roles become cross-references, ``::`` blocks become fenced code, and what follows the sections of a
numpydoc docstring (an equivalent in PyTorch, say) moves in front of them, where it isn't taken for
a parameter.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTIONS = ("Parameters", "Attributes", "Returns", "Raises", "Examples")
# Documented on the site: what a role may link to.
PUBLIC = re.compile(r"fastis(\.(?!kernels|operators|table|check|BY_NAME|variance$)\w+)+$")
GROUPED = re.compile(r"(\w+, )+\w+$")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = with_references(obj.docstring.value, obj)
            text = with_prose_first(with_single_names(text))
            obj.docstring.value = with_fences(text)


def with_references(text: str, obj: griffe.Object) -> str:
    """``:func:`name``` as a link, or as plain code where there is nothing on the site."""

    def link(match: re.Match[str]) -> str:
        name = match["name"].lstrip("~")
        shown = f"`{name.removeprefix('fastis.')}`"
        try:
            target = name if name.startswith(("fastis.", "torch.")) else obj.resolve(name)
        except griffe.NameResolutionError:
            target = f"{obj.path}.{name}"
        return f"[{shown}][{target}]" if PUBLIC.match(target) else shown

    text = re.sub(r":(?:class|func|meth|mod|data|attr):`(?P<name>[^`]+)`", link, text)
    return text.replace("``", "`")


def with_single_names(text: str) -> str:
    """Parameters that share a description, one by one: each has a type and default of its own."""
    head, line, tail = text.partition("\nParameters\n----------\n")
    body, header, rest = re.split(r"(\n\n(?:\w+\n-{3,}\n)|$)", tail, maxsplit=1)
    items = re.split(r"^(?=\S)", body, flags=re.M)
    for at, item in enumerate(items):
        names, _, description = item.partition("\n")
        if GROUPED.match(names) and description.startswith(" "):
            description = description.rstrip("\n")
            items[at] = "".join(f"{name}\n{description}\n" for name in names.split(", "))
    return head + line + "".join(items).rstrip("\n") + header + rest


def with_prose_first(text: str) -> str:
    """Paragraphs that follow a section's items, before the first section."""
    prose: list[str] = []
    sections: list[str] = []
    into = prose
    lines = re.sub(r"^Example\n-------$", "Examples\n--------", text, flags=re.M).split("\n")
    for at, line in enumerate(lines):
        if line in SECTIONS and set("".join(lines[at + 1 : at + 2])) == {"-"}:
            into = sections
            if line != "Examples":
                sections.append("")
        elif into is sections and re.match(r"(?!>>>)\S", line) and not lines[at - 1]:
            into = prose
        into.append(line)
    return "\n".join([*prose, *sections])


def with_fences(text: str) -> str:
    """Blocks announced by ``::`` as fenced Python."""

    def fence(match: re.Match[str]) -> str:
        code = textwrap.dedent(match["code"]).strip("\n")
        code = "\n".join(match["indent"] + line if line else "" for line in code.split("\n"))
        colon = ":" if match["lead"].strip() else ""
        indent = match["indent"]
        return f"{match['lead']}{colon}\n\n{indent}```python\n{code}\n{indent}```\n"

    block = r"^(?P<lead>(?P<indent> *)[^\n]*?)::\n\n(?P<code>(?:(?P=indent) +[^\n]*\n|\n)+)"
    return re.sub(block, fence, text + "\n", flags=re.M).rstrip("\n")
