"""``fastis.DataLoader`` in the hands of Lightning, Accelerate and Hugging Face's Trainer: it works,
or it is an error."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch.utils.data import TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fastis

N, B = 200, 10
X, Y = torch.randn(N, 5), torch.randint(3, (N,))
TAKEN_APART = r"a fastis\.DataLoader can't be taken apart"


def make(workers: int = 0) -> fastis.DataLoader:
    sampler = fastis.Sampler(N, B, seed=0)
    return fastis.DataLoader(TensorDataset(X, Y, torch.arange(N)), sampler, num_workers=workers)


# Lightning ----------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("lightning")


def trained(lightning, tmp_path, in_hook: bool = False, workers: int = 0, **arguments):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(5, 3), []
            if in_hook:
                self.train_dataloader = lambda: make(workers)

        def training_step(self, minibatch, _):
            batch, (x, y, index) = minibatch
            assert torch.equal(batch.indices, index)
            out = fastis.cross_entropy(self.layer(x), y, batch.weights)
            self.trainer.train_dataloader.sampler.update(batch, out)
            self.seen.append(batch.indices)
            return out.loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, quiet = Module(), ("logger", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        **dict.fromkeys(quiet, False),
        **arguments,
    )
    trainer.fit(module, None if in_hook else make(workers))
    return torch.cat(module.seen)


@pytest.mark.parametrize("in_hook", [False, True])
def test_lightning_trains_by_it(lightning, tmp_path, in_hook):
    seen = trained(lightning, tmp_path, in_hook)
    assert torch.equal(seen[:N].sort().values, torch.arange(N))
    assert len(seen) == 2 * N


def test_lightning_ends_epochs_early_and_loses_nothing(lightning, tmp_path):
    seen = trained(lightning, tmp_path, workers=2, limit_train_batches=10)
    assert torch.equal(seen.sort().values, torch.arange(N))


def test_lightning_must_not_put_a_sampler_in(lightning):
    from lightning.pytorch.utilities.data import _update_dataloader

    with pytest.raises(RuntimeError, match=TAKEN_APART):
        _update_dataloader(make(), DistributedSampler(X, 2, 0))


# Accelerate, and Hugging Face's Trainer, which resumes by skipping --------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_must_not_rebuild_it(processes):
    loading = pytest.importorskip("accelerate.data_loader")
    prepared = loading.prepare_data_loader(make(), num_processes=processes, process_index=0)
    with pytest.raises(RuntimeError, match=TAKEN_APART):
        list(prepared)


def test_minibatches_are_not_skipped_behind_its_back():
    loading = pytest.importorskip("accelerate.data_loader")
    with pytest.raises(RuntimeError, match=TAKEN_APART):
        list(loading.skip_first_batches(make(), 3))


# torchdata ----------------------------------------------------------------------------------------


def test_it_saves_by_the_methods_of_torchdatas_loader():
    theirs = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    for name in ("state_dict", "load_state_dict"):
        parameters = [
            inspect.signature(getattr(c, name)).parameters for c in (theirs, type(make()))
        ]
        assert list(parameters[0]) == list(parameters[1])
