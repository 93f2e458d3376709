"""The callback and Lightning's checkpoints: a resumed run ends as one that was never stopped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint

from fastis.integrations.lightning import ImportanceSampling
from integrations.test_lightning import (
    DATA,
    PER_EPOCH,
    B,
    Module,
    cosine,
    halving,
    make_trainer,
    pytestmark,  # noqa: F401
    trained,
    validation,
)


class Asking(Module):
    """Has the training data loaded, and iterated over, before the Trainer loads any state."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class Adjusted:
    """A module and a callback with all that a resumed run must get back."""

    def __init__(self, workers, module=Module, **trainer):
        self.workers, self.module, self.trainer = workers, module, trainer

    def run(self, *callbacks, fit=None):
        module = self.module(self.workers, schedule=cosine)
        callback = ImportanceSampling(adjust_lr=True, uniform_from=0.9)
        trainer = make_trainer(callback, *callbacks, **self.trainer)
        trainer.fit(module, **(fit or {}))
        return module, callback


def assert_goes_on(runs, whole, path, fit=None):
    done = torch.load(path, weights_only=True)["global_step"]
    module, callback = runs.run(fit={**(fit or {}), "ckpt_path": path})
    expected, its_callback = whole
    assert done + len(module.got) == len(expected.got)
    for got, should in zip(module.got, expected.got[done:], strict=True):
        assert torch.equal(got.indices, should.indices)
        assert torch.equal(got.weights, should.weights)
    assert module.rates == expected.rates[done:]
    assert torch.equal(module.layer.weight, expected.layer.weight)
    ours, theirs = (c.sampler.state_dict() for c in (callback, its_callback))
    assert torch.equal(ours["states"], theirs["states"])


@pytest.mark.parametrize(
    ("workers", "limit", "module"),
    [
        (0, {}, Module),
        (2, {}, Asking),
        (0, {"max_steps": 95}, Module),
        (0, {"limit_train_batches": 15}, Module),
    ],
    ids=["epochs", "2 workers", "max_steps", "limit_train_batches"],
)
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(tmp_path, workers, limit, module):
    """From the middle of an epoch, its last step and its end."""
    runs = Adjusted(workers, module, **limit)
    per_epoch = limit.get("limit_train_batches", PER_EPOCH)
    whole = runs.run(
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1),
        ModelCheckpoint(tmp_path, "last-{step}", every_n_train_steps=per_epoch, save_top_k=-1),
        ModelCheckpoint(tmp_path, "end-{step}", save_top_k=-1),
    )
    for name in ("step=49", f"last-step={3 * per_epoch}", f"end-step={2 * per_epoch}"):
        assert_goes_on(runs, whole, tmp_path / f"{name}.ckpt")


def test_resumed_at_a_validation_within_an_epoch(tmp_path):
    fit = {"val_dataloaders": validation()}
    runs = Adjusted(2, val_check_interval=6)
    save = ModelCheckpoint(tmp_path, "val-{step}", monitor="val_loss", save_top_k=-1)
    whole = runs.run(save, fit=fit)
    assert_goes_on(runs, whole, tmp_path / "val-step=52.ckpt", fit)


def test_saved_after_the_run_and_continued(tmp_path):
    whole = Adjusted(1, max_steps=70).run()
    module, callback = Module(1, schedule=cosine), ImportanceSampling(adjust_lr=True)
    trainer = make_trainer(callback, max_steps=47)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other, callback = Module(1, schedule=cosine), ImportanceSampling(adjust_lr=True)
    make_trainer(callback, max_steps=63).fit(other, ckpt_path=tmp_path / "last.ckpt")
    assert module.rates + other.rates == whole[0].rates[:63]


def test_evaluating_a_checkpoint_leaves_the_next_run_alone(tmp_path):
    module, callback = Module(), ImportanceSampling()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.validate(module, validation(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    other = Module()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other)
    assert callback.sampler.step == PER_EPOCH, "a sampler of its own"


def test_a_checkpoint_without_a_loader_warns(tmp_path):
    class Uniform(Module):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(DATA, B)

        def training_step(self, minibatch, batch_idx):
            return F.cross_entropy(self.layer(minibatch[0]), minibatch[1])

    trainer = make_trainer(max_epochs=1)
    trainer.fit(Uniform())
    trainer.save_checkpoint(tmp_path / "uniform.ckpt")
    with pytest.warns(UserWarning, match=r"no state of a fastis\.DataLoader"):
        trained(fit={"ckpt_path": tmp_path / "uniform.ckpt"}, max_epochs=2)


def test_adjust_lr_must_be_as_saved(tmp_path):
    """Else a schedule would take a state that is not its own, without a word."""
    trainer = make_trainer(ImportanceSampling(adjust_lr=True), max_epochs=1)
    trainer.fit(Module(schedule=halving))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="adjust_lr must be as in the run that wrote"):
        trained(Module(schedule=halving), {"ckpt_path": tmp_path / "last.ckpt"})
