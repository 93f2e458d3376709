"""Active bias: more of the samples whose label is predicted with little confidence, or unsteadily.

Chang, Learned-Miller & McCallum 2017, as compared in Kutsuna 2025, sec. 9.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastis.batch import Scored
from fastis.kernels.layout import UPDATES, Table
from fastis.kernels.state import LARGEST_SCORE
from fastis.kernels.table import Observation
from fastis.methods.weighted import Distinct, WithoutCoefficients, assign
from fastis.saved import FINITE, Range


@dataclass(frozen=True)
class Confidence(WithoutCoefficients):
    """Samples whose label has had a low predicted probability come more often.

    With P the softmax probability of the label at every visit so far::

        a_i = 1 - mean(P);   w_i = a_i + mean over the data of a

    Minibatches have no coefficients (weights are 1): a biased estimate, by design. For
    :func:`fastis.cross_entropy` with class indices alone: P is taken as exp(-loss), which class
    weights or label smoothing would falsify. Samples without a visit have the mean a. Every step
    costs O(N), since the mean moves every weight.

    Parameters
    ----------
    warmup_epochs : int
        epochs without replacement before the weights are used (ours).
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "confidence"
    memory_ranges: ClassVar[dict[str, Range]] = {
        "visits": Range(0, 2**30),
        "mean": Range(-LARGEST_SCORE, LARGEST_SCORE),
        "squares": FINITE,
    }

    def memory(self, table: Table) -> dict[str, Tensor]:
        n, device = table.constants.num_samples, table.device
        return {
            "visits": torch.zeros(n, dtype=torch.int32, device=device),
            "mean": torch.zeros(n, dtype=torch.float32, device=device),
            # Summed squares of the deviations.
            "squares": torch.zeros(n, dtype=torch.float32, device=device),
        }

    def observed(self, out: Scored) -> Tensor:
        return out.losses.neg().exp()

    def learn(self, table: Table, observation: Observation, kept: Distinct) -> None:
        visits, mean, squares = (table.memory[name] for name in ("visits", "mean", "squares"))
        i, p = kept.indices, kept.observed
        number, before = visits[i] + 1, mean[i]
        d = p - before
        after = before + d / number
        kept.write(squares, squares[i] + d * (p - after))
        kept.write(mean, after)
        kept.write(visits, number)
        updates = table.count_on_host(UPDATES) + 1
        self.update_table(table, observation)
        if updates >= table.constants.warmup_draws:
            a = self.uncertainty(visits, mean, squares)
            visited = visits > 0
            mean_a = (a * visited).sum() / visited.sum().clamp(min=1)
            assign(table, a + mean_a, which=visited)  # the others have the mean of these

    def uncertainty(self, visits: Tensor, mean: Tensor, squares: Tensor) -> Tensor:
        """a, float32 [N], of the visits to each sample."""
        return 1 - mean


@dataclass(frozen=True)
class ConfVar(Confidence):
    """Samples whose label's predicted probability varies come more often.

    With v the sample variance of P over the n visits so far::

        a_i = sqrt(v + v^2 / (n - 1)), 0 for n < 2;   w_i = a_i + mean over the data of a

    (n - 1 in v too, a choice of ours.) Uniform while all a are 0. Otherwise as :class:`Confidence`.
    """

    name: ClassVar[str] = "confvar"

    def uncertainty(self, visits: Tensor, mean: Tensor, squares: Tensor) -> Tensor:
        degrees = (visits - 1).clamp(min=1)
        v = squares.clamp(min=0) / degrees
        return torch.where(visits > 1, (v + v * v / degrees).sqrt(), 0.0)
