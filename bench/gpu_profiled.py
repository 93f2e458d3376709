"""A few launches for a profiler: the large losses without and with gradient, or the sampler's.

python bench/gpu_profiled.py losses|sampler
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import bench_gpu_loss, bench_graph
from bench.bench_sample import scored

ROWS, CLASSES = 8192, 128256


def losses(rows: int = ROWS, classes: int = CLASSES) -> None:
    """Two warm-up launches of each kernel, then one of each that counts."""
    for shape in ((rows, classes, torch.bfloat16), (32768 * rows // ROWS, 1000, torch.bfloat16)):
        data = bench_gpu_loss.data_of(shape)
        for _ in range(3):
            bench_gpu_loss.raw(data, False)
            bench_gpu_loss.raw(data, True)
        torch.cuda.synchronize()


def sampler(n: int = 1_000_000, batch_size: int = 4096) -> None:
    made = bench_graph.make_sampler(n, batch_size, 3.0)
    out = scored(torch.rand(batch_size, device="cuda") + 0.1)
    for _ in range(4):
        batch = made.sample()
        made.update(batch, out)
    made.update_and_sample(batch, out)
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    name, *numbers = sys.argv[1:] if argv is None else argv
    {"losses": losses, "sampler": sampler}[name](*map(int, numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
