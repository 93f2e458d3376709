"""Counter-based randomness: known answers, exact scaling, bijectivity, agreement of backends."""

from __future__ import annotations

import pytest
import torch

import fastis
from fastis.kernels.cpu import categorical as cpu_categorical
from fastis.kernels.reference import categorical as reference_categorical
from fastis.kernels.reference import philox as reference_philox
from fastis.kernels.reference.philox import permute, random_words, scale

# Known answers of Philox4x32-10 from Random123's kat_vectors: counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    position = counter[0] | (counter[1] & 0xFFFFFF) << 32
    words = random_words(
        key[0] | key[1] << 32,
        counter[1] >> 24,
        counter[2] | counter[3] << 32,
        torch.tensor([position]),
    )
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("total", [1, 2, 3, 1000, 2**31 + 1, 2**32, 2**61 + 12345, 2**62])
def test_scale_is_exact(total):
    words = random_words(7, 2, 9, torch.arange(200))
    extremes = [[0, 0, 0, 0], [0xFFFFFFFF] * 4]
    rows = [[int(w[i]) for w in words] for i in range(200)] + extremes
    expected = [
        (sum(word << (32 * i) for i, word in enumerate(row)) * total) >> 128 for row in rows
    ]
    got = scale([torch.tensor(column) for column in zip(*rows, strict=True)], total)
    assert got.tolist() == expected


@pytest.mark.parametrize("total", [1, 10, 2**40 + 7, 2**62])
def test_backends_draw_the_same_integers(total):
    args = (total, 2**63 + 5, 2**33 - 250, 501, torch.device("cpu"))
    assert torch.equal(
        cpu_categorical.random_below(*args), reference_categorical.random_below(*args)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 4097])
def test_permutation_is_a_bijection(n):
    for epoch in range(3):
        images = permute(11, epoch, n, torch.arange(n))
        assert torch.equal(images.sort().values, torch.arange(n))


def test_permutation_depends_on_seed_and_epoch():
    images = [permute(s, e, 1000, torch.arange(1000)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(
        (a == b).float().mean() < 0.02 for a, b in ((images[0], images[1]), (images[0], images[2]))
    )


@pytest.mark.parametrize("n", [3, 5, 10, 30])
def test_permutation_puts_every_value_everywhere_equally_often(n):
    trials = 4000
    table = torch.zeros(n, n)
    sampler = fastis.Sampler(n, n, method="scan", seed=3)  # a minibatch is a whole permutation
    for _ in range(trials):
        table[torch.arange(n), sampler.sample().indices] += 1
    expected = trials / n
    chi2 = float(((table - expected) ** 2 / expected).sum())
    freedom = (n - 1) ** 2
    # Normal approximation, 5 sigma: a false alarm in 3.5 million.
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_streams_do_not_share_blocks():
    positions = torch.arange(1000)
    streams = [
        tuple(w.tolist() for w in random_words(1, stream, 0, positions))
        for stream in (
            reference_philox.STREAM_DRAW,
            reference_philox.STREAM_PERMUTATION,
            reference_philox.STREAM_WEIGHTS,
        )
    ]
    firsts = [set(zip(*words, strict=True)) for words in streams]
    assert not firsts[0] & firsts[1]
    assert not firsts[0] & firsts[2]
    assert not firsts[1] & firsts[2]
