"""Scores from processes that do nothing else (Alain et al. 2016): scorers beside a trainer.

A :class:`Scorer` has a copy of the network, takes the newest parameters every few minibatches,
sweeps the data, and sends (indices, scores, iteration of the parameters). The trainer's
:class:`Inbox` publishes parameters and folds what has arrived into the sampler's table, between two
steps. Neither waits for the other::

    # in the scorer's process
    Scorer(model, score_fn, num_samples=len(train), store="trainer:29511").run()

    # in the trainer's
    inbox = Inbox(sampler, store="trainer:29511")
    for step in range(total_steps):
        inbox.publish(model, step)
        inbox.fold()
        batch = sampler.sample()
        ...  # the step as ever

From the bottom up: :mod:`~fastis.scoring.channel` is what goes between the processes,
:mod:`~fastis.scoring.traces` what the scores say of the variance, then the two ends.
"""

from __future__ import annotations

from fastis.scoring.channel import Channel, StoreChannel
from fastis.scoring.inbox import Inbox
from fastis.scoring.scorer import Scorer
from fastis.scoring.traces import Traces

__all__ = ["Channel", "Inbox", "Scorer", "StoreChannel", "Traces"]
