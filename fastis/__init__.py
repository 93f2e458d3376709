"""fastis: importance sampling for SGD in PyTorch at the cost of uniform sampling."""

# torch first: its OpenMP runtime is then the one that fastis._C shares.
import torch as _torch  # noqa: F401

from fastis import estimators, methods
from fastis.any_loss import from_losses, scored_loss
from fastis.batch_norm import weighted_batch_norm
from fastis.categorical import AliasTable, sample
from fastis.checkpoint import load_checkpoint, save_checkpoint
from fastis.coefficients import batch_weights
from fastis.config import show_config
from fastis.data import DataLoader
from fastis.figures import contact_sheet, plot
from fastis.kernels import backend
from fastis.kernels.table import Batch
from fastis.loss import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from fastis.lr import EffectiveBatchLR, EffectiveIterationsLR
from fastis.sampler import Sampler
from fastis.scalars import log
from fastis.scored import ScoredLoss
from fastis.sharded import ShardedSampler
from fastis.suspects import suspects

__version__ = "0.1.0"

__all__ = [
    "AliasTable",
    "Batch",
    "DataLoader",
    "EffectiveBatchLR",
    "EffectiveIterationsLR",
    "Sampler",
    "ScoredLoss",
    "ShardedSampler",
    "backend",
    "batch_weights",
    "binary_cross_entropy_with_logits",
    "contact_sheet",
    "cross_entropy",
    "estimators",
    "from_losses",
    "load_checkpoint",
    "log",
    "methods",
    "mse_loss",
    "plot",
    "sample",
    "save_checkpoint",
    "scored_loss",
    "show_config",
    "suspects",
    "weighted_batch_norm",
]
