"""What the machine code of the GPU kernels must not do, from rows of ``kernel_resources.py``: by
itself, and beside the rows of an earlier compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ARCHITECTURES = (80, 90, 100, 120)
# Releases of the compiler differ by some registers, a changed kernel by more.
SLACK = 32
# Bytes of stack that are no spilling loop: the compiler keeps up to four numbers there at will.
STACK = 16
# More than that, six numbers, in these: on sm_100 and sm_120, for all of their programs to be
# resident at once. Their rows of 16 KB are what takes the time.
KNOWN_STACKS = {
    "cross_entropy 4096x4096 fp32 grad mean_grad": 24,
    "cross_entropy 4096x4096 fp32 soft class_weights grad mean_grad": 24,
}
# Kernels whose programs loop over tiles: all of a launch must be resident at once.
LOOPED = ("label_tiles_kernel", "distribution_tiles_kernel", "label_loss_kernel")
MULTIPROCESSORS = 132  # of an H200
# Nothing in these files may be read past the coherent caches: other blocks are writing.
COHERENT = ("table.cu", "categorical.cu")
# Instructions of the hot loops on sm_90, about 3 % above what releases 3.6.0 to 3.9.0 make of them:
# an element of a sweep without and with a store, and a row of a tile.
PER_ELEMENT = {
    "label_sweeps_kernel": (8.5, 6.0),
    "distribution_sweeps_kernel": (35.0, 37.0),
}
PER_ROW = {
    "cross_entropy 32768x1000 bf16": 440,
    "cross_entropy 32768x1000 bf16 grad": 690,
    "cross_entropy 32768x1000 bf16 grad mean_grad": 785,
}


def broken_rules(row: dict[str, Any]) -> Iterator[str]:
    """What a kernel's machine code does that it must not."""
    if row["local"] > KNOWN_STACKS.get(row["call"], STACK):
        yield f"spills: {row['local']} bytes of local memory a thread"
    if row["call"] in COHERENT and row.get("constant_loads"):
        yield f"has {row['constant_loads']} loads that pass by the coherent caches"
    on_h200 = row["sm"] == 90
    if on_h200 and row["kernel"] in LOOPED:
        most = MULTIPROCESSORS * row["resident"]
        if row["programs"] > most:
            yield f"has {row['programs']} programs, of which {most} fit at once"
        bound, fewest = PER_ROW.get(row["call"]), row["loops"][0]["instructions"]
        if bound is not None and fewest > bound:
            yield f"takes {fewest} instructions a row, above {bound}"
    if row["kernel"].endswith("sweeps_kernel"):
        for loop in row["loops"]:
            yield from _broken_in_sweep(loop, PER_ELEMENT[row["kernel"]], on_h200)


def _broken_in_sweep(
    loop: dict[str, Any], bounds: tuple[float, float], on_h200: bool
) -> Iterator[str]:
    if loop["shuffles"]:
        yield f"shuffles in a loop of a sweep ({loop['shuffles']} times)"
    # (float16 logits are half as wide as their gradient.)
    narrow = [w for w in loop["loads"] if int(w) < (8 if loop["stores"] else 16)]
    narrow += [w for w in loop["stores"] if int(w) < 16]
    if narrow:
        yield f"accesses {narrow[0]} bytes at a time in a sweep"
    each, bound = loop["instructions"] / loop["elements"], bounds[bool(loop["stores"])]
    if on_h200 and each > bound:
        yield f"takes {each:.1f} instructions an element in a sweep, above {bound}"


def identity(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["kernel"], row["call"], row["sm"]


def complaints(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[str]:
    """What is wrong with ``rows``, alone and beside the rows of the file."""
    found = []
    before = {identity(row): row for row in kept}
    for row in rows:
        name = "{} of {!r} for sm_{}".format(*identity(row))
        found += [f"{name} {rule}" for rule in broken_rules(row)]
        old = before.pop(identity(row), None)
        if old is None:
            found.append(f"{name} is not in the file: run bench/kernel_resources.py")
        elif row["registers"] > old["registers"] + SLACK:
            found.append(f"{name}: {old['registers']} registers became {row['registers']}")
    sources = {row["call"] for row in rows}
    if {row["sm"] for row in rows} == set(ARCHITECTURES):
        # Where there is no nvcc, nothing is said of its kernels.
        before = {
            key: old for key, old in before.items() if key[1] in sources or ".cu" not in key[1]
        }
        found += [f"{'{} of {!r} for sm_{}'.format(*key)} is launched no more" for key in before]
    return found
