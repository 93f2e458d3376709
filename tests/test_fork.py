"""Workers forked from a process that has used OpenMP's threads go on, and compute the same."""

from __future__ import annotations

import pytest
import torch
from test_data import B, Indices, N, make

import fastis

C = 1000  # so many classes that rows are shared among threads
ROWS = 512


class Computes(Indices):
    """Every sample takes fastis's and torch's own threads, if there were several."""

    def __getitem__(self, index: int) -> tuple[int, float, float, int]:
        generator = torch.Generator().manual_seed(index)
        logits = torch.randn(ROWS, C, generator=generator)
        out = fastis.cross_entropy(logits, torch.arange(ROWS), torch.ones(ROWS))
        weights = torch.rand(300_000, generator=generator)
        drawn = fastis.sample(weights, 5, generator=generator)
        product = (logits @ logits.T).sum()
        return index, float(out.score.sum()), float(product), int(drawn.indices.sum())


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_workers_after_the_parent_used_threads():
    dataset = Computes(20)
    sampler = fastis.Sampler(20, 2, method="scan")
    parent = [dataset[i] for i in range(20)]  # starts the threads here
    # A child that waits for its parent's threads would wait for ever.
    loader = fastis.DataLoader(dataset, sampler, num_workers=2, timeout=60)
    assert fastis.Sampler(N, B).sample()  # and between the forks
    seen = 0
    for batch, (index, score, product, drawn) in loader:
        assert torch.equal(batch.indices, index)
        for i, values in zip(index.tolist(), zip(score, product, drawn, strict=True), strict=True):
            assert tuple(float(v) for v in values) == pytest.approx(parent[i][1:], rel=1e-5)
        seen += len(index)
    assert seen == 20


@pytest.mark.usefixtures("two_threads")
def test_the_parent_goes_on_with_its_threads():
    dataset = Computes(20)
    before = dataset[3]
    loader = make(num_workers=2, timeout=60)
    for number, _ in enumerate(loader):
        if number == 3:
            assert dataset[3] == before
