"""What this GPU gives at best: a copy, a read, random reads, an empty node of a graph.

A kernel that moves as many bytes as it must can't be faster than these. The copy is torch's
(``cudaMemcpyAsync``), in bytes read plus bytes written; the read is a kernel of our own, because no
library has one that only reads. Random reads draw their places with Philox, as a draw does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.report import Report, make_parser
from bench.timing import device_us


@triton.jit
def read_kernel(x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    """Reads [num_elements] int32 and stores one number a program. Moves 4 num_elements bytes."""
    total = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, num_elements, tl.num_programs(0).to(tl.int64) * BLOCK):
        total ^= tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def gather_kernel(x_ptr, out_ptr, num_items, count, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Reads ``count`` items of ``WORDS`` int64 each at random from [num_items, WORDS]."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        random = tl.randint(7, start + tl.arange(0, BLOCK)).to(tl.uint32, bitcast=True)
        item = (random.to(tl.uint64) * num_items >> 32).to(tl.int64)
        words = tl.load(x_ptr + item[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
        total ^= tl.sum(words, 1)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def empty_kernel():
    pass


def ceilings(repeats: int, megabytes: int = 2048) -> dict[str, float]:
    """Bytes a second of a copy and of a read, over a buffer much larger than any cache."""
    size = megabytes << 20
    source = torch.randint(1 << 16, (size // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = device_us([lambda: target.copy_(source)], repeats)
    check_read(source[: 1 << 20])
    read = min(
        device_us([_reader(source, programs)], repeats)
        for programs in (132 * 8, 132 * 16, 132 * 64)
    )
    return {"copy": 2 * size / copy * 1e6, "read": size / read * 1e6}


def gathers_a_second(num_items: int, count: int, size: int, repeats: int) -> float:
    """The most items of ``size`` bytes, 8 or 16, that are read at random a second."""
    words = size // 8
    source = torch.ones(num_items, words, dtype=torch.int64, device="cuda")

    def reader(programs: int, block: int) -> Callable[[], object]:
        out = torch.empty(programs, dtype=torch.int64, device="cuda")
        arguments = source, out, num_items, count
        return lambda: gather_kernel[(programs,)](*arguments, WORDS=words, BLOCK=block, num_warps=8)

    times = [
        device_us([reader(132 * many, block)], repeats) for many in (8, 32) for block in (256, 1024)
    ]
    return count / min(times) * 1e6


def node_microseconds(repeats: int, nodes: int = 200) -> float:
    """What an empty kernel takes as one of many nodes of a graph."""
    return device_us([lambda: empty_kernel[(1,)](num_warps=1)] * nodes, repeats)


def _reader(source: Tensor, programs: int) -> Callable[[], object]:
    out = torch.empty(programs, dtype=torch.int32, device=source.device)
    grid = (programs,)
    return lambda: read_kernel[grid](source, out, source.numel(), BLOCK=4096, num_warps=8)


def check_read(source: Tensor) -> None:
    """The reader really reads all: one program's sum of exclusive ors."""
    out = torch.empty(1, dtype=torch.int32, device=source.device)
    read_kernel[(1,)](source, out, source.numel(), BLOCK=4096, num_warps=8)
    lanes = torch.zeros(4096, dtype=torch.int32, device=source.device)
    for block in source.view(-1, 4096):
        lanes ^= block
    if int(out) != int(lanes.sum(dtype=torch.int32)):
        raise AssertionError("the read that the ceiling is measured with is wrong")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "of the ceilings")
    parser.add_argument("--megabytes", type=int, default=2048)
    args = parser.parse_args(argv)
    found = {"node_us": node_microseconds(30), **ceilings(30, args.megabytes)}
    report = Report("gpu ceilings", found, args.json)
    report.store(found, "cuda")
    report.line(*(f"{value:.4g}" for value in found.values()))
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
