"""Which samples are most likely mislabelled: a ranking by what training has learnt already."""

from __future__ import annotations

from torch import Tensor

from fastis import check
from fastis.figures import check_sampler
from fastis.sampler import Sampler


def suspects(sampler: Sampler, count: int | None = None) -> Tensor:
    """Indices of the samples that are most likely mislabelled, the most suspicious first.

    They are ranked by ``sampler.mean``, the moving average of each sample's score: a wrong label
    keeps the gradient large long after those of its class have become small. (Ranking by the loss
    in the course of training: Huang, Qu, Jia and Zhao 2019, "O2U-Net"; by the gradient's norm:
    Paul, Ganguli and Dziugaite 2021.) Nothing is trained or evaluated for it. Equal::

        seen = (sampler.last_seen >= 0).nonzero().flatten()
        seen[sampler.mean[seen].argsort(descending=True, stable=True)][:count]

    It is a ranking, not a verdict: correctly labelled samples that are hard are among the first,
    too. Training until the network knows wrong labels by heart spoils it, less with a longer
    memory, ``EMAIS(tau_scale=1.0)`` (measured: ``docs/recipes/label-errors.md``).

    Parameters
    ----------
    sampler : Sampler
        after some epochs; of a method whose table is one of scores: emais, loss, distributed.
    count : int, optional
        that many at most. None: all samples that have been seen.

    Returns
    -------
    Tensor
        int64 ``[count]`` on the sampler's device, or shorter, if fewer have been seen: those that
        have not are never among them.

    Raises
    ------
    TypeError, ValueError
        for what is no sampler, a sampler that keeps no scores of the samples or has seen none, and
        a count that is not in [1, num_samples].

    See Also
    --------
    fastis.contact_sheet : pictures of them.

    O(N log N), and waits for a device.

    Example
    -------
    >>> for i in fastis.suspects(sampler, 20).tolist():
    ...     print(i, labels[i])
    """
    check_sampler(sampler)
    if count is not None:
        count = check.integer("count", count, 1, sampler.num_samples)
    if not sampler.method.folds:
        raise ValueError(
            "sampler must have a method that keeps each sample's score (emais, loss, distributed), "
            f"got {sampler.method.name!r}"
        )
    seen = (sampler.last_seen >= 0).nonzero().flatten()
    if len(seen) == 0:
        raise ValueError("sampler must have seen samples, got one without any update")
    return seen[sampler.mean[seen].argsort(descending=True, stable=True)][:count]
