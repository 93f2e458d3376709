"""A small data set to train on in another process."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class TwoClasses(Dataset):
    """Two classes that overlap: an input of 16 numbers, its class and its index."""

    def __init__(self, num_samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(2, (num_samples,), generator=generator)
        self.x = torch.randn(num_samples, 16, generator=generator) + self.y[:, None] * 0.7

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int):
        return self.x[index], self.y[index], index
