"""The table's CUDA code on the threads of a CPU, under ThreadSanitizer: every barrier is needed.

tests/threads stands in for CUDA below csrc/cuda/grid.cuh: a thread for each thread of a launch,
real barriers, relaxed atomics. What runs is compared with csrc/device on HostGrid, and must be free
of races. Then each barrier of the sources is left out in turn (numbered by the test, so that one
program does for all), which must show: as a race, other bits, or a hang.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GRID = "cuda/grid.cuh"
TABLE = (
    "flatten.h",
    "device/table_update.h",
    "device/table_clear.h",
    "device/tree.h",
    "device/update_cap.h",
    "device/table_draw.h",
)
ALIAS = "device/alias_build.h"
BARRIER = re.compile(
    r"(grid|block)\.wait\(\);|__syncthreads\(\);|cooperative_groups::this_grid\(\)\.sync\(\);"
)
SECONDS = 60


def barriers() -> list[tuple[str, int]]:
    """File and line of every barrier; its number is its place in this list."""
    found = []
    for name in (GRID, *TABLE, ALIAS):
        for line, text in enumerate((ROOT / "csrc" / name).read_text().splitlines(), 1):
            found += [(name, line)] * len(BARRIER.findall(text))
    return found


BARRIERS = barriers()


def instrumented(folder: Path) -> Path:
    """Copies of the sources whose barriers can be left out by number."""
    number = iter(range(len(BARRIERS)))
    for name in (GRID, *TABLE, ALIAS):
        source = (ROOT / "csrc" / name).read_text()
        target = folder / "csrc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(BARRIER.sub(lambda m: f"if (left_out != {next(number)}) {m[0]}", source))
    return folder / "csrc"


def run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The compiled tests by name, as the beginning of a command."""
    folder = tmp_path_factory.mktemp("threads")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", "-pthread"]
    trial = folder / "trial.cpp"
    trial.write_text("int main() {}\n")
    # ThreadSanitizer does not know every layout of memory that the kernel may choose at random.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    works = run([compiler, *flags, str(trial), "-o", str(folder / "trial")], 100).returncode == 0
    if not works or run([*prefix, str(folder / "trial")], SECONDS).returncode != 0:
        pytest.skip("no ThreadSanitizer")
    flags += [f"-I{ROOT / 'tests/threads'}", f"-I{instrumented(folder)}", f"-I{ROOT / 'csrc'}"]
    flags += ["-DFASTIS_THREADS=8", "-DFASTIS_WARP=2"]
    for name in ("table", "alias"):
        source = ROOT / "tests/threads" / f"{name}.cpp"
        built = run([compiler, *flags, str(source), "-o", str(folder / name)], 300)
        assert built.returncode == 0, built.stderr
    return {name: [*prefix, str(folder / name)] for name in ("table", "alias")}


def fault(program: list[str], blocks: int, left_out: int) -> str:
    """What went wrong; empty if nothing did."""
    try:
        done = run([*program, str(blocks), str(left_out)], SECONDS)
    except subprocess.TimeoutExpired:
        return "hangs"
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("name", ["table", "alias"])
def test_no_races_and_equal_bits(programs, name, blocks):
    assert fault(programs[name], blocks, -1) == ""


@pytest.mark.parametrize(
    "number", range(len(BARRIERS)), ids=[f"{name}:{line}" for name, line in BARRIERS]
)
def test_no_barrier_can_be_left_out(programs, number):
    name = BARRIERS[number][0]
    runs = {
        GRID: [("table", 2), ("table", 1), ("alias", 2)],
        ALIAS: [("alias", 2), ("alias", 1)],
    }.get(name, [("table", 2), ("table", 1)])
    assert any(fault(programs[program], blocks, number) for program, blocks in runs)
