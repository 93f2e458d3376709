"""Philox4x32-10 and the keyed permutation in plain PyTorch: what csrc/philox.h computes.

Unsigned 32-bit words live in int64 tensors; a product of two of them wraps modulo 2^64, and its
halves are read by shifting and masking.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
STREAM_DRAW, STREAM_PERMUTATION, STREAM_WEIGHTS = range(3)
_ROUNDS_OF_PERMUTATION = 8


def _halves(product: Tensor) -> tuple[Tensor, Tensor]:
    return (product >> 32) & MASK32, product & MASK32


def random_words(seed: int, stream: int, iteration: int, positions: Tensor) -> list[Tensor]:
    """Four words of 32 random bits, lowest first, for each of the draws ``positions`` (int64)."""
    zero = torch.zeros_like(positions)
    c = [
        positions & MASK32,
        (positions >> 32) | (stream << 24),
        zero + (iteration & MASK32),
        zero + (iteration >> 32),
    ]
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        high0, low0 = _halves(c[0] * 0xD2511F53)
        high1, low1 = _halves(c[2] * 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def scale(words: list[Tensor], total: int) -> Tensor:
    """floor(R total / 2^128), R the bits of ``words``, total <= 2^62: schoolbook, in 32 bits."""
    columns = [torch.zeros_like(words[0]) for _ in range(7)]
    for i, word in enumerate(words):
        for j, limb in enumerate((total & MASK32, total >> 32)):
            high, low = _halves(word * limb)
            columns[i + j] = columns[i + j] + low
            columns[i + j + 1] = columns[i + j + 1] + high
    for i in range(6):
        columns[i + 1] = columns[i + 1] + (columns[i] >> 32)
        columns[i] = columns[i] & MASK32
    return columns[4] | (columns[5] << 32)


def permute(seed: int, epoch: int, n: int, positions: Tensor) -> Tensor:
    """The images of ``positions`` (int64, below n) under this epoch's permutation of [0, n)."""
    half = 1
    while half < 32 and 1 << (2 * half) < n:
        half += 1
    mask = (1 << half) - 1
    blocks = torch.arange(_ROUNDS_OF_PERMUTATION // 4, device="cpu")
    words = random_words(seed, STREAM_PERMUTATION, epoch, blocks)
    keys = torch.stack(words, dim=1).flatten().tolist()
    images = positions
    outside = torch.ones_like(positions, dtype=torch.bool)
    while outside.any():
        left, right = images >> half, images & mask
        for key in keys:
            v = (right + key) & MASK32
            v = ((v ^ (v >> 16)) * 0x85EBCA6B) & MASK32
            v = ((v ^ (v >> 13)) * 0xC2B2AE35) & MASK32
            v = (v ^ (v >> 16)) & mask
            left, right = right, left ^ v
        images = torch.where(outside, (left << half) | right, images)
        outside = images >= n
    return images
