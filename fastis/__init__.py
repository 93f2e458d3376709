"""fastis: importance sampling for SGD in PyTorch at the cost of uniform sampling."""

# torch first: its OpenMP runtime is then the one that fastis._C shares.
import torch as _torch  # noqa: F401

from fastis import methods
from fastis.kernels import backend, show_config
from fastis.lr import EffectiveBatchLR
from fastis.sampler import Sampler
from fastis.sampling import AliasTable, Batch, sample

__version__ = "0.1.0"

__all__ = [
    "AliasTable",
    "Batch",
    "EffectiveBatchLR",
    "Sampler",
    "backend",
    "methods",
    "sample",
    "show_config",
]
