"""Per-sample gradient norms and variance traces, outside a sampler: for assessing and for tests."""

from fastis.gradients import gradient_norms, per_sample_gradients
from fastis.variance import Traces, estimate_traces, population_traces

__all__ = [
    "Traces",
    "estimate_traces",
    "gradient_norms",
    "per_sample_gradients",
    "population_traces",
]
