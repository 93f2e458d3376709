"""fastis: importance sampling for SGD in PyTorch at the cost of uniform sampling."""

# torch first: its OpenMP runtime is then the one that fastis._C shares.
import torch as _torch  # noqa: F401

from fastis.kernels import backend, show_config

__version__ = "0.1.0"

__all__ = ["backend", "show_config"]
