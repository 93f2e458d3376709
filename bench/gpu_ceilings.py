"""What the memory of this GPU gives: the fastest copy and the fastest read, measured like the rest.

A kernel that moves as many bytes as it must can't be faster than these. The copy is torch's
(``cudaMemcpyAsync``), in bytes read plus bytes written; the read is a kernel of our own, because no
library has one that only reads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_kernel(x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    """Reads [num_elements] int32 and stores one number a program. Moves 4 num_elements bytes."""
    total = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, num_elements, tl.num_programs(0).to(tl.int64) * BLOCK):
        total ^= tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls, one after the other, as a CUDA graph: replayed without work on the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets allocators and libraries settle
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median time of one call on the device. Calls on different data keep the cache cold."""
    graph = graph_of(calls)
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def ceilings(repeats: int, megabytes: int = 2048) -> dict[str, float]:
    """Bytes a second of a copy and of a read, over a buffer much larger than any cache."""
    size = megabytes << 20
    source = torch.randint(1 << 16, (size // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds([lambda: target.copy_(source)], repeats)
    check_read(source[: 1 << 20])
    read = min(
        microseconds([_reader(source, programs)], repeats)
        for programs in (132 * 8, 132 * 16, 132 * 64)
    )
    return {"copy": 2 * size / copy * 1e6, "read": size / read * 1e6}


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
