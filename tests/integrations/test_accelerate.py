"""fastis.integrations.accelerate.prepare in Accelerate's loops, and in its checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

import fastis

accelerate = pytest.importorskip("accelerate")

from fastis.integrations.accelerate import prepare  # noqa: E402

N, B, STEPS = 60, 6, 34  # three epochs of 10 steps and a part of the fourth
X, Y = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
X[::4] *= 4


@pytest.fixture
def accelerator():
    """Makes one, which thinks of itself as one of ``processes``."""
    state = accelerate.state

    def make(processes=1, **options):
        made = accelerate.Accelerator(cpu=True, **options)
        made.state.num_processes = processes
        return made

    yield make
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()


class Run:
    """A script for Accelerate: model, optimizer, loader and schedule, prepared."""

    def __init__(self, accelerator, workers=0, accumulated=1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        self.sampler = fastis.Sampler(N, B, seed=0)
        loader = fastis.DataLoader(
            TensorDataset(X, Y, torch.arange(N)), self.sampler, num_workers=workers
        )
        schedule = fastis.EffectiveBatchLR(CosineAnnealingLR(optimizer, STEPS), self.sampler)
        self.accelerator = accelerator(gradient_accumulation_steps=accumulated)
        self.loader = prepare(self.accelerator, loader)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, optimizer, schedule
        )
        self.steps, self.seen, self.synchronised = 0, [], []

    def train(self, steps=STEPS, save_at=None, folder=None):
        while self.steps < steps:
            for batch, (x, y, index) in self.loader:
                assert torch.equal(batch.indices, index)
                with self.accelerator.accumulate(self.model):
                    out = fastis.cross_entropy(self.model(x), y, batch.weights)
                    self.sampler.update(batch, out)
                    self.accelerator.backward(out.loss)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                self.synchronised.append(self.accelerator.sync_gradients)
                self.seen.append(index)
                self.steps += 1
                if self.steps == save_at:
                    self.accelerator.save_state(folder)
                if self.steps == steps:
                    break
        return self

    def parameters(self):
        return list(self.model.parameters())


def test_it_is_the_loop_without_accelerate(accelerator):
    run = Run(accelerator).train()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sampler = fastis.Sampler(N, B, seed=0)
    schedule = fastis.EffectiveBatchLR(CosineAnnealingLR(optimizer, STEPS), sampler)
    torch.manual_seed(1)
    again = Run(accelerator)  # consumes as many random numbers as the other did before its loop
    loader = fastis.DataLoader(TensorDataset(X, Y, torch.arange(N)), sampler)
    steps = 0
    while steps < STEPS:
        for batch, (x, y, _) in loader:
            out = fastis.cross_entropy(model(x), y, batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            schedule.step()
            steps += 1
            if steps == STEPS:
                break
    del again
    assert bool((run.sampler.importance != 1).any())
    for found, wanted in zip(run.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("save_at", [17, 30])  # in the middle of an epoch, and at the end of one
def test_state_is_saved_and_loaded_bit_for_bit(accelerator, tmp_path, workers, save_at):
    whole = Run(accelerator, workers).train(save_at=save_at, folder=tmp_path)
    resumed = Run(accelerator, workers)
    resumed.accelerator.load_state(tmp_path)
    resumed.steps = save_at
    if save_at % len(resumed.loader) == 0:
        assert list(resumed.loader) == [], "the rest of the pass that was saved"
    resumed.train()
    assert torch.equal(torch.cat(resumed.seen), torch.cat(whole.seen[save_at:]))
    assert torch.equal(resumed.sampler.importance, whole.sampler.importance)
    for found, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_accumulation_ends_with_the_pass(accelerator):
    """Ten minibatches in threes; the last of the pass stands alone, as with torch's loader."""
    run = Run(accelerator, accumulated=3).train(20)
    assert [i + 1 for i, done in enumerate(run.synchronised) if done] == [
        3,
        6,
        9,
        10,
        13,
        16,
        19,
        20,
    ]
    assert run.sampler.step == 20


def test_a_resumed_pass_ends_where_it_would_have(accelerator, tmp_path):
    whole = Run(accelerator, accumulated=3).train(20, save_at=14, folder=tmp_path)
    resumed = Run(accelerator, accumulated=3)
    resumed.accelerator.load_state(tmp_path)
    resumed.steps = 14
    resumed.train(20)
    assert resumed.synchronised == whole.synchronised[14:]


def test_a_pass_that_is_left_leaves_nothing_behind(accelerator):
    run = Run(accelerator)
    for _ in run.loader:
        break
    assert not run.accelerator.gradient_state.in_dataloader
    seen = [index for _, (_, _, index) in run.loader]
    assert len(seen) == len(run.loader) == 10


def test_batch_and_data_come_on_the_accelerators_device(accelerator):
    run = Run(accelerator)
    run.loader.device = torch.device("meta")
    batch, data = next(iter(run.loader))
    assert {tensor.device.type for tensor in (*batch, *data)} == {"meta"}
    run.loader.device = None  # device_placement=False
    batch, data = next(iter(run.loader))
    assert {tensor.device.type for tensor in (*batch, *data)} == {"cpu"}


def test_prepared_twice_it_stays_what_it_is(accelerator):
    run = Run(accelerator)
    assert run.accelerator.prepare(run.loader) is run.loader
    assert run.loader.sampler is run.sampler
    with pytest.raises(ValueError, match="loader must be prepared once"):
        prepare(run.accelerator, run.loader.loader)


def test_other_ways_say_what_to_do(accelerator):
    run = Run(accelerator)
    with pytest.raises(RuntimeError, match=r"fastis\.integrations\.accelerate\.prepare"):
        list(run.accelerator.prepare(run.loader.loader))
    with pytest.raises(RuntimeError, match="load the loader's state_dict instead of skipping"):
        list(run.accelerator.skip_first_batches(run.loader, 3))
    with pytest.raises(TypeError, match=r"must be a fastis\.DataLoader, got DataLoader"):
        prepare(run.accelerator, torch.utils.data.DataLoader(X))


def test_several_processes_are_refused(accelerator):
    loader = fastis.DataLoader(TensorDataset(X, Y), fastis.Sampler(N, B, seed=0))
    with pytest.raises(ValueError, match=r"accelerator must be of one process, .* one of 2"):
        prepare(accelerator(processes=2), loader)


def test_a_checkpoint_without_the_loader_is_refused(accelerator, tmp_path):
    plain = accelerator()
    plain.prepare(nn.Linear(2, 2))
    plain.save_state(tmp_path)
    loader = fastis.DataLoader(TensorDataset(X, Y), fastis.Sampler(N, B, seed=0))
    other = accelerator()
    other.prepare(nn.Linear(2, 2))
    prepare(other, loader)
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        other.load_state(tmp_path)
