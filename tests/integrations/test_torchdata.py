"""torchdata's StatefulDataLoader: what is written for it takes a fastis.DataLoader as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

import fastis

torchdata = pytest.importorskip("torchdata.stateful_dataloader")
N, B = 96, 8

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Range(TensorDataset):
    def __init__(self) -> None:
        super().__init__(torch.arange(N))


def stateful(workers: int):
    generator = torch.Generator().manual_seed(0)
    return torchdata.StatefulDataLoader(
        Range(), B, shuffle=True, drop_last=True, num_workers=workers, generator=generator
    )


def ours(workers: int):
    return fastis.DataLoader(Range(), fastis.Sampler(N, B, seed=0), num_workers=workers)


def indices_of(loader, item) -> list[int]:
    """A StatefulDataLoader gives (data,), a fastis.DataLoader (batch, (data,))."""
    if isinstance(loader, fastis.DataLoader):
        batch, (index,) = item
        assert torch.equal(batch.indices, index)
        loader.sampler.update(batch, (index % 7).float() + 0.1)
        return index.tolist()
    (index,) = item
    return index.tolist()


def trainer(loader, passes: int, save_after: int | None = None):
    """Its loop: goes on in the pass that was saved; what came, and the state on the way."""
    came, state = [], None
    for _ in range(passes):
        for item in loader:
            came.append(indices_of(loader, item))
            if len(came) == save_after:
                state = copy.deepcopy(loader.state_dict())
    return came, state


@pytest.mark.parametrize("save_after", [1, 5, 17])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [stateful, ours])
def test_a_loop_that_saves_in_the_middle_of_a_pass(make, workers, save_after):
    came, state = trainer(make(workers), 3, save_after)
    assert len(came) == 3 * (N // B)
    resumed = make(workers)
    resumed.load_state_dict(state)
    rest, _ = trainer(resumed, 3 - save_after // (N // B))
    if make is stateful:  # without workers the passes after this one are others
        this_pass = -save_after % (N // B)
        rest, came = rest[:this_pass], came[: save_after + this_pass]
    assert rest == came[save_after:]


def test_it_refuses_the_sampler():
    sampler = fastis.Sampler(N, B)
    for arguments in ({"sampler": sampler, "batch_size": B}, {"batch_sampler": sampler}):
        loader = torchdata.StatefulDataLoader(Range(), **arguments)
        for use in (lambda loader=loader: next(iter(loader)), loader.state_dict):
            with pytest.raises(TypeError, match=r"use fastis.DataLoader\(dataset, sampler\)"):
                use()


def test_it_refuses_the_parts_of_a_loader():
    loader = ours(0)
    rebuilt = torchdata.StatefulDataLoader(loader.dataset, batch_sampler=loader.batch_sampler)
    with pytest.raises(RuntimeError, match="can't be taken apart"):
        next(iter(rebuilt))
