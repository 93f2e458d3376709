"""Under a limit on memory nothing aborts: MemoryError, or torch's own error for its tensors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastis

MiB = 1 << 20


def weights(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.1


def losses():
    z, y = torch.randn(2, MiB, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    long, tokens = torch.randn(8, 1 << 17, 4), torch.zeros(8, 1 << 17, dtype=torch.int64)
    p = torch.rand(2, MiB)
    return {
        "wide": lambda: fastis.cross_entropy(z, y).loss,
        "smoothed": lambda: fastis.cross_entropy(z, y, label_smoothing=0.1).loss,
        "soft": lambda: fastis.cross_entropy(z, p).loss,
        "sequences": lambda: fastis.cross_entropy(long, tokens).loss,
        "bce": lambda: fastis.binary_cross_entropy_with_logits(z, p).loss,
        "mse": lambda: fastis.mse_loss(z, p).loss,
    }


def tables():
    many = weights(MiB)
    return {
        "sample": lambda: (
            fastis.sample(many, 100, generator=torch.Generator().manual_seed(0)).weights
        ),
        "alias": lambda: (
            fastis.AliasTable(many).sample(100, generator=torch.Generator().manual_seed(0)).weights
        ),
    }


def sampler():
    sampler = fastis.Sampler(1000, 10, seed=0)

    def step():
        batch = sampler.sample()
        sampler.update(batch, fastis.ScoredLoss(batch.weights, *[weights(10)] * 2, None))
        return torch.tensor(True)

    return {"sampler": step}


def mapped() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


def run(make) -> None:
    """Each call under limits from next to nothing to enough; prints what came of it."""
    import resource

    torch.set_num_threads(2)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for name, call in make().items():
        expected = call().detach().clone()
        for spare in range(24):
            resource.setrlimit(resource.RLIMIT_AS, (mapped() + spare * MiB, unlimited[1]))
            try:
                call()
                outcome = "fits"
            except MemoryError:
                outcome = "MemoryError"
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):
                    raise
                outcome = "torch"
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
            print(name, outcome, flush=True)
        torch.testing.assert_close(call().detach(), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("make", [losses, tables, sampler])
def test_out_of_memory_is_an_error_and_all_goes_on(make):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_out_of_memory as t; "
    # What is freed goes back to the system, so that every call has to ask for all of it again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(
        [sys.executable, "-c", f"{code}t.run(t.{make.__name__})"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-2000:]}"
    if make is losses:
        assert "MemoryError" in result.stdout  # of scratch memory, which is not torch's
