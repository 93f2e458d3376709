"""One concept, one stem: the words that were given up are in no file name and no identifier."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Words that named the same thing as another word, and that one.
GIVEN_UP = {
    "structure": "tree",
    "starts": "prefix",
    "ends": "prefix",
    "settle": "update_cap",
    "survey": "reduce",
    "weigh": "quantize",
    "weighed": "quantize",
    "weighing": "quantize",
    "given": "categorical",
    "locate": "inverse_cdf",
    "search": "draw, or inverse_cdf",
    "is_plain": "fused",
    "whole": "single_block",
    "room": "capacity",
    "following": "next_batch",
    "record": "state",
    "records": "state",
    "heavy": "capped, but in alias tables",
    "light": "uncapped, but in alias tables",
    "alias_resolve": "alias_inverse_cdf",
    "label_loss": "elementwise",
}
FILES = [
    *(path for path in (ROOT / "fastis").rglob("*.py")),
    *(
        path
        for path in (ROOT / "csrc").rglob("*.*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    ),
]
# By file: the two kinds of an alias table's items; a CUDA stream's record_event; the key of a saved
# state of version 1.
OTHER_MEANING = {
    "alias": {"heavy", "light"},
    "categorical": {"heavy", "light"},
    "in_flight": {"record"},
    "inbox": {"record"},
    "exchange": {"record"},
    "saved": {"records"},
}


def identifiers(path):
    text = path.read_text()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                yield token.string
        return
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", "", text, flags=re.S)
    yield from re.findall(r"\b[A-Za-z_]\w*", code)


def words(name):
    """The words of snake_case and CamelCase, and the whole name."""
    return {w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)} | {
        name.strip("_")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names(path):
    """A name with a word that was given up: use the other one."""
    allowed = {w for part, ws in OTHER_MEANING.items() if part in path.stem for w in ws}
    names = {path.stem, *identifiers(path)}
    found = {name: word for name in names for word in words(name) & GIVEN_UP.keys() - allowed}
    assert not found, {name: GIVEN_UP[word] for name, word in found.items()}
