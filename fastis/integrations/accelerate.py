"""A fastis.DataLoader under Accelerate.

``accelerator.prepare`` builds another loader of the parts of the one that it is given, which would
lose the coefficients. :func:`prepare` does to a fastis.DataLoader what that does, around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device

from fastis.data import DataLoader
from fastis.kernels.table import Batch


def prepare(accelerator: Accelerator, loader: DataLoader) -> PreparedLoader:
    """The loader as Accelerate's loops take it; in place of ``accelerator.prepare(loader)``.

    - Batch and data come on ``accelerator.device``.
    - ``accelerator.accumulate`` ends an accumulation with the last minibatch of a pass. Under
      accumulation each minibatch of the loader is a part, drawn and updated on its own:
      ``batch_size`` is a part's.
    - ``accelerator.save_state`` and ``load_state`` hold the sampler and the minibatches with the
      workers, as a registered object. A resumed loop goes on with the rest of its pass: nothing is
      to be skipped.

    Models, optimizers and schedules go through ``accelerator.prepare``, as ever.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        of one process.
    loader : fastis.DataLoader
        whose sampler may live on ``accelerator.device``.

    Raises
    ------
    TypeError
        for another loader.
    ValueError
        for several processes, which would draw the same samples; for a loader prepared before.

    Equivalent to::

        accelerator.register_for_checkpointing(loader)
        for batch, data in loader:
            yield batch.to(accelerator.device), send_to_device(data, accelerator.device)

    Example
    -------
    >>> loader = prepare(accelerator, fastis.DataLoader(dataset, sampler))
    >>> model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    >>> for batch, (x, y) in loader:
    ...     with accelerator.accumulate(model):
    ...         out = fastis.cross_entropy(model(x), y, batch.weights)
    ...         sampler.update(batch, out)
    ...         accelerator.backward(out.loss)
    ...         optimizer.step(); schedule.step(); optimizer.zero_grad()
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a fastis.DataLoader, got {type(loader).__name__}")
    if accelerator.num_processes > 1:
        raise ValueError(
            "accelerator must be of one process, each of several would draw the same samples, got "
            f"one of {accelerator.num_processes}: launch with --num_processes 1"
        )
    if loader in accelerator._custom_objects:
        raise ValueError("loader must be prepared once, got one that this accelerator has")
    accelerator.register_for_checkpointing(loader)
    return PreparedLoader(accelerator, loader)


class PreparedLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """What :func:`prepare` returns. All else is the loader's: ``sampler``, ``ahead``, ..."""

    _drop_last = True  # read by begin()

    def __init__(self, accelerator: Accelerator, loader: DataLoader) -> None:
        self.loader, self.gradient_state = loader, GradientState()
        self.device = accelerator.device if accelerator.device_placement else None
        self.non_blocking = accelerator.non_blocking

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        self.begin()
        try:
            under_way: Any = iter(self.loader)
            for batch, data in under_way:
                # Known without looking ahead, which a saved state would count as handed out.
                self.end_of_dataloader = under_way.position == len(self.loader)
                if self.device is not None:
                    batch = batch.to(self.device, non_blocking=self.non_blocking)
                    data = send_to_device(data, self.device, non_blocking=self.non_blocking)
                yield batch, data
        finally:
            self.end()

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # being copied, or unpickled
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.loader, name)
