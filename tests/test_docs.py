"""The README and the documentation: Python blocks run, links lead somewhere, the README is short.

The blocks of a page run in order in one namespace, which starts with PREAMBLE. A block that cannot
run here has the comment ``<!-- not run: reason -->`` on the line before it.
"""

from __future__ import annotations

import random
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "compiles for a minute": 1,
    "needs a GPU": 2,
    "needs a logger": 1,
    "needs torchrun": 1,
    "needs Ray": 1,
}
# What a page may take for granted: a network, data, and a loop that has left its uniform epochs.
PREAMBLE = """
import torch
import torch.nn.functional as F
import fastis

torch.manual_seed(0)
x, y = torch.randn(640, 20), torch.randint(10, (640,))
model = torch.nn.Linear(20, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
importance = torch.rand(640)
total_steps = 3
sampler = fastis.Sampler(len(x), 128)
for _ in range(12):
    batch = sampler.sample()
    out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
    sampler.update(batch, out)
"""


class Block(NamedTuple):
    """A fenced block of Python."""

    line: int
    code: str
    not_run: str | None  # why


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    mark = r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?"
    fence = mark + r"(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$"
    return [
        Block(
            text.count("\n", 0, found.start("code")) + 1,
            textwrap.dedent(found["code"]),
            found["why"],
        )
        for found in re.finditer(fence, text, flags=re.M | re.S)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def _as_it_was():
    """Pages seed torch and may define classes; the other tests don't see it."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name_of)
def test_blocks_run(page, capsys):
    for library in re.findall(r"^from fastis\.integrations\.(\w+)", page.read_text(), flags=re.M):
        if library != "diffusion":  # which takes the place of a class, and needs no library
            pytest.importorskip(library)
    namespace: dict = {"__name__": "page"}
    exec(PREAMBLE, namespace)
    for block in blocks(page):
        if block.not_run is None:
            # Line numbers of an error are those of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, name_of(page), "exec"), namespace)


# What a script that is changed may take for granted.
SCRIPT = """
train = torch.utils.data.TensorDataset(x, y)
device, epochs = "cpu", 2
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
"""


def diffs(page: Path) -> list[list[str]]:
    """The lines of each diff that is to be run."""
    fence = r"^<!-- run before and after -->\n```diff\n(.*?)^```$"
    found = re.findall(fence, page.read_text(), flags=re.M | re.S)
    return [diff.splitlines() for diff in found]


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("side", ["-", "+"])
@pytest.mark.parametrize(
    "lines",
    [pytest.param(d, id=f"{name_of(p)}-{i}") for p in PAGES for i, d in enumerate(diffs(p))],
)
def test_scripts_run_before_and_after(lines, side):
    """With five changed lines at most."""
    assert all(line[:1] in ("", " ", "-", "+") for line in lines)
    changed = [line for line in lines if line.startswith("+")]
    assert 1 <= len(changed) <= 5
    namespace: dict = {"__name__": "page"}
    exec(PREAMBLE + SCRIPT, namespace)
    del namespace["sampler"]
    before = torch.nn.utils.parameters_to_vector(namespace["model"].parameters()).detach().clone()
    exec("\n".join(line[1:] for line in lines if line[:1] in ("", " ", side)), namespace)
    after = torch.nn.utils.parameters_to_vector(namespace["model"].parameters())
    assert not torch.equal(before, after), "it trains"
    if side == "+":
        sampler = namespace.get("sampler") or namespace["loader"].sampler
        assert sampler.step > 1
        assert torch.equal(sampler.sample().weights, torch.ones(128)) == (sampler.step < 10)


def test_blocks_that_do_not_run_are_few_and_compile():
    found = [block for page in PAGES for block in blocks(page) if block.not_run]
    for block in found:
        compile(block.code, "block", "exec")
    counts = {reason: sum(b.not_run == reason for b in found) for reason in NOT_RUN}
    assert counts == NOT_RUN
    assert len(found) == sum(NOT_RUN.values()), "a reason that is not in NOT_RUN"


def test_every_python_block_is_found():
    for page in PAGES:
        assert page.read_text().count("```python") == len(blocks(page)), name_of(page)


def anchors(page: Path) -> set[str]:
    """Those of the headings: as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {re.sub(r" +", "-", title.strip()) for title in plain}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} links to {target}"


def test_readme_is_short_and_has_the_commands():
    text = README.read_text()
    lines = text.splitlines()
    assert len(lines) <= 145
    assert len(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).split()) <= 900
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert len(tables) <= 2
    assert all(table.count("\n") <= 2 + 5 for table in tables)
    (tests,) = (line for line in lines if re.match(r"python3 -m venv \.venv .*pytest$", line))
    assert tests.endswith("-e '.[test]' && .venv/bin/pytest")


@pytest.mark.usefixtures("threads_and_data")
def test_the_figure_of_the_readme_is_drawn_from_rows(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.experiments import readme_figure

    assert readme_figure.main(["--out", str(tmp_path / "readme.png")]) == 0
    assert (tmp_path / "readme.png").stat().st_size > 10_000
    assert "bench/results/readme.png" in README.read_text()
