"""A sampler's state: as a dict, in a pickle, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastis import saved
from fastis.misuse import Watch
from fastis.monitor import Monitored

_STATE_VERSION = 3
# Arguments that may differ between the sampler that wrote a state and the one that loads it.
_NOT_SETTINGS = ("method", "group", "correction")


class Resumable(Monitored):
    """What of a :class:`fastis.Sampler` can be saved and loaded."""

    _watch: Watch
    correction: float
    _processes: int

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, as new tensors.

        Tensors, numbers and strings only: fit for ``torch.save`` and ``weights_only=True``. All of
        one moment, also while another thread draws and updates (O(N), during which that one waits).
        Raises nothing of its own.
        """
        with torch.inference_mode(False), self._table.lock:
            return {
                "version": _STATE_VERSION,
                "settings": self._settings(),
                "correction": self.correction,
                **self._table.snapshot(),
            }

    def _settings(self) -> dict[str, Any]:
        settings = {k: v for k, v in self._arguments.items() if k not in _NOT_SETTINGS}
        # Of a group: the global minibatch's, which any number of processes may share.
        return {
            **settings,
            "batch_size": self._arguments["batch_size"] * self._processes,
            "method": self._method.name,
            "options": self._method.options(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict` of a sampler with the same arguments, from any device.

        ``num_samples`` may have grown: what was appended to the data set is unseen then, and a
        warning says so. An epoch, also of the uniform ones at the start, is one of the new N.

        It goes into the tensors that are there, so that a CUDA graph captured before goes on with
        the state loaded. Seed and correction are parts of the state and taken over too; a graph,
        however, keeps those that it was captured with: capture anew when they differ.

        Every number is checked first, so that also a file from elsewhere or a damaged one either
        gives a table that is right or is refused. O(N).

        Raises
        ------
        ValueError
            for a version, setting, shape or number that the state of this sampler can't have.
        TypeError
            for a state that is no dict, and what is no dense ``torch.Tensor`` of the right dtype.

        Both say what was expected and what came; nothing has changed then.
        """
        theirs = saved.upgraded(state)
        state = saved.grown(self._table, theirs, self._method.memory)
        seed = saved.checked_seed(state, _STATE_VERSION, self._settings())
        correction = saved.checked_correction(state, self._method.has_coefficients)
        with torch.inference_mode(False):
            method = self._method
            tensors = saved.checked(self._table, state, method.memory_ranges, method.renews)
            with self._table.lock:
                self._table.load(tensors, seed)
                if state is not theirs:
                    self._method.grow(self._table)
                self._watch.learnt()
                self._arguments["seed"] = seed
            self.correction = correction

    def __getstate__(self) -> dict[str, Any]:
        arguments = {**self._arguments, "device": str(self.device)}
        return {"arguments": arguments, "state": saved.as_arrays(self.state_dict())}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(**pickled["arguments"])  # type: ignore[misc]
        self.load_state_dict(saved.as_tensors(pickled["state"]))
