"""The callback in Lightning's own loop: the plain loop's results, bit for bit, or an error."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

import fastis

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from fastis.integrations.lightning import ImportanceSampling

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "does not have many workers",
        "You defined a `validation_step` but have no",
        "Be aware that when using `ckpt_path`",
        "`training_step` returned `None`",
        "LeafSpec",
    )
]
N, B = 200, 10
PER_EPOCH = N // B
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))
DATA = TensorDataset(X, Y, torch.arange(N))


class Recorded(fastis.Sampler):
    """Keeps what it draws."""

    def sample(self):
        batch = super().sample()
        self.__dict__.setdefault("drawn", []).append(batch)
        return batch


def make_loader(workers=0, **arguments):
    sampler = Recorded(N, B, seed=0, **arguments)
    return fastis.DataLoader(DATA, sampler, num_workers=workers)


def network():
    layer = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.1)
    return layer


class Module(lightning.LightningModule):
    """Returns the ScoredLoss, as the documentation says."""

    def __init__(self, workers=0, schedule=None, loss=fastis.cross_entropy, **arguments):
        super().__init__()
        self.layer, self.workers, self.arguments = network(), workers, arguments
        self.schedule, self.loss = schedule, loss
        self.got, self.rates = [], []

    def train_dataloader(self):
        return make_loader(self.workers, **self.arguments)

    def scored(self, minibatch):
        batch, (x, y, index) = minibatch
        assert type(batch) is fastis.Batch
        assert torch.equal(batch.indices, index)
        self.got.append(batch)
        return self.loss(self.layer(x), y, batch.weights)

    def training_step(self, minibatch, batch_idx):
        return self.scored(minibatch)

    def validation_step(self, minibatch, batch_idx):
        x, y, _ = minibatch
        self.log("val_loss", F.cross_entropy(self.layer(x), y))

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return optimizer if self.schedule is None else self.schedule(optimizer)


def make_trainer(*callbacks, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=saves,
        **{**quiet, **({} if "max_steps" in arguments else {"max_epochs": 5}), **arguments},
    )


def trained(module=None, fit=None, callback=None, **arguments):
    module = Module() if module is None else module
    callback = ImportanceSampling() if callback is None else callback
    make_trainer(callback, **arguments).fit(module, **(fit or {}))
    return module, callback


def validation():
    return torch.utils.data.DataLoader(DATA, 50)


# The minibatches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, 100),
        ({"limit_train_batches": 7}, 35),
        ({"max_steps": 47}, 47),
        ({"val_check_interval": 6, "num_sanity_val_steps": 2}, 100),
        ({"accumulate_grad_batches": 3}, 100),
    ],
    ids=["epochs", "limit_train_batches", "max_steps", "validation", "accumulation"],
)
def test_each_minibatch_has_its_coefficients_and_none_is_lost(workers, arguments, steps):
    module = Module(workers)
    fit = {"val_dataloaders": validation()} if "val_check_interval" in arguments else None
    _, callback = trained(module, fit, **arguments)
    drawn = callback.sampler.drawn
    assert len(module.got) == callback.sampler.step == steps
    assert 0 <= len(drawn) - steps <= 2 * workers + 1
    for batch, expected in zip(module.got, drawn, strict=False):
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.weights, expected.weights)
    assert any((batch.weights != 1).any() for batch in module.got) == (steps > 2 * PER_EPOCH)


def test_an_early_end_of_an_epoch_loses_nothing():
    class Stopping(Module):
        def on_train_batch_start(self, minibatch, batch_idx):
            return -1 if batch_idx == 8 else None

    _, callback = trained(Stopping(1), max_epochs=6)
    learnt, drawn = callback.sampler.step, len(callback.sampler.drawn)
    assert learnt == 6 * 8
    assert drawn - learnt <= 6 + 3, "one an epoch was handed out and skipped by the module"


def test_the_loader_may_be_a_data_modules():
    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

    assert_same(*trained(fit={"datamodule": Data()}), by_hand())


def test_lightning_moves_the_batch_as_a_whole():
    from lightning.fabric.utilities import move_data_to_device

    batch, data = move_data_to_device(next(iter(make_loader())), torch.device("meta"))
    assert type(batch) is fastis.Batch
    assert {tensor.device.type for tensor in (*batch, *data)} == {"meta"}


# The step -----------------------------------------------------------------------------------------


def halving(optimizer):
    return [optimizer], [StepLR(optimizer, 1, 0.5)]


def cosine(optimizer):
    schedule = CosineAnnealingLR(optimizer, 100, eta_min=0.01)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def by_hand(make=None, accumulated=1, clip=None, adjust=False, steps=100):
    """The same in plain PyTorch: the layer, the rate of each optimizer step."""
    layer, loader = network(), make_loader()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    scheduler = optimizer if make is None else make(optimizer)[1][0]
    by_epoch = make is halving
    if isinstance(scheduler, dict):
        scheduler = scheduler["scheduler"]
    if adjust:
        scheduler = fastis.EffectiveBatchLR(scheduler, loader.sampler)
    rates, done = [], 0
    while done < steps:
        for batch, (x, y, _) in loader:
            out = fastis.cross_entropy(layer(x), y, batch.weights)
            loader.sampler.update(batch, out)
            (out.loss / accumulated).backward()
            done += 1
            if done % accumulated:
                continue
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(layer.parameters(), clip)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            ends_epoch = done % PER_EPOCH == 0
            if scheduler is not optimizer and (ends_epoch or not by_epoch):
                scheduler.step()
            elif adjust:
                scheduler.renew()
    return layer, rates, loader.sampler


def assert_same(module, callback, expected):
    layer, rates, sampler = expected
    assert module.rates == rates
    assert torch.equal(module.layer.weight, layer.weight)
    assert torch.equal(callback.sampler.mean, sampler.mean)


@pytest.mark.parametrize(
    ("trainer", "loop"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulated": 2}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
    ],
    ids=["plain", "accumulation", "clipping"],
)
def test_it_is_the_plain_loop(trainer, loop):
    assert_same(*trained(**trainer), by_hand(**loop))


@pytest.mark.parametrize("schedule", [None, halving, cosine])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_rates_follow_the_sampler_whatever_the_interval(schedule, accumulated):
    expected = by_hand(schedule, accumulated, adjust=True)
    found = trained(
        Module(schedule=schedule),
        callback=ImportanceSampling(adjust_lr=True),
        accumulate_grad_batches=accumulated,
    )
    assert_same(*found, expected)
    plain = by_hand(schedule, accumulated)[1]
    assert expected[1] != plain, "the factor is not 1"


def test_adjust_lr_takes_the_arguments_of_the_scheduler():
    callback = ImportanceSampling(adjust_lr={"max_factor": 1.001})
    module, _ = trained(Module(), callback=callback)
    assert max(module.rates) == pytest.approx(0.5 * 1.001)
    assert callback._schedulers[0].max_factor == 1.001


def test_a_plateau_gets_its_metric():
    def plateau(optimizer):
        schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, factor=0.1)
        return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}

    callback = ImportanceSampling(adjust_lr=True)
    trained(Module(schedule=plateau), {"val_dataloaders": validation()}, callback, max_epochs=4)
    (schedule,) = callback._schedulers
    assert schedule.get_unscaled_lr() == pytest.approx([0.5e-4]), "no epoch was good enough"
    assert schedule.get_last_lr() != pytest.approx([0.5e-4])


def test_a_dict_may_hold_the_scored_loss():
    class WithMore(Module):
        def training_step(self, minibatch, batch_idx):
            return {"loss": self.scored(minibatch), "more": 1}

        def on_train_batch_end(self, outputs, minibatch, batch_idx):
            assert outputs["more"] == 1
            assert outputs["loss"].shape == ()

    assert_same(*trained(WithMore()), by_hand())


def test_the_module_may_update_by_itself():
    class Updating(Module):
        def training_step(self, minibatch, batch_idx):
            out = self.scored(minibatch)
            self.trainer.train_dataloader.sampler.update(minibatch[0], out)
            return out.loss

    assert_same(*trained(Updating()), by_hand())


@pytest.mark.parametrize("adjust_lr", [False, True])
def test_manual_optimization(adjust_lr):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, minibatch, batch_idx):
            out = self.scored(minibatch)
            optimizer = self.optimizers()
            self.manual_backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
            return out

    callback = ImportanceSampling(adjust_lr=adjust_lr)
    assert_same(*trained(Manual(), callback=callback), by_hand(adjust=adjust_lr))


def test_a_closure_that_is_called_again_counts_once():
    class WithLBFGS(Module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

        def on_before_optimizer_step(self, optimizer):
            pass

    module, callback = trained(WithLBFGS(), max_epochs=2)
    assert len(module.got) > 2 * PER_EPOCH
    assert callback.sampler.step == 2 * PER_EPOCH


def test_a_step_without_a_loss_is_left_out():
    class Skipping(Module):
        def training_step(self, minibatch, batch_idx):
            out = self.scored(minibatch)
            return out if batch_idx % 2 else None

    assert trained(Skipping())[1].sampler.step == 50


def test_the_scaler_may_skip_a_step():
    """The sampler learns from that minibatch all the same."""

    def loss(logits, target, weights):
        out = fastis.cross_entropy(logits, target, weights)
        return out._replace(loss=out.loss * scales.pop())

    scales = [1.0] * 90 + [float("inf")] + [1.0] * 9
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module, callback = trained(
        Module(loss=loss), plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler)
    )
    assert scaler.get_scale() == 2.0
    assert callback.sampler.step == 100
    assert module.layer.weight.isfinite().all()


def test_mixed_precision():
    module, callback = trained(precision="bf16-mixed")
    assert callback.sampler.step == len(module.got) == 100
    assert callback.sampler.skipped == 0
    assert {batch.weights.dtype for batch in module.got} == {torch.float32}


def test_draws_are_uniform_from_some_step_on():
    module, callback = trained(callback=ImportanceSampling(uniform_from=0.8))
    assert callback.sampler.uniform
    last = torch.cat([batch.indices for batch in module.got[80:]])
    assert torch.equal(last.sort().values, torch.arange(N))
    weights = torch.stack([batch.weights for batch in module.got])
    assert (weights[80:] == 1).all()
    assert (weights[79] != 1).any()
    assert module.got[80].weights.shape == (B,)


# The documentation, and the library's older name --------------------------------------------------


def test_the_diff_of_the_documentation(monkeypatch, tmp_path):
    """Five lines, and both scripts train."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs/recipes/lightning.md"
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) == 5
    torch.manual_seed(0)
    train = TensorDataset(torch.randn(300, 20), torch.randint(10, (300,)))
    for sign, steps in (("-", 30), ("+", 20)):  # of 300 samples the last minibatch is left out
        names = {"torch": torch, "F": F, "DataLoader": torch.utils.data.DataLoader, "train": train}
        code = "\n".join(line[1:] for line in lines if not line or line[0] in (" ", sign))
        exec(compile(code, str(page), "exec"), names)
        assert names["trainer"].global_step == steps
    assert names["trainer"].callbacks[0].sampler.step == steps


OLDER_NAME = """
import sys, warnings

warnings.simplefilter("ignore")
if {alone}:  # pytorch_lightning is installed without lightning
    sys.modules["lightning"] = None
import pytorch_lightning, torch, fastis
from fastis.integrations.lightning import ImportanceSampling


class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def training_step(self, minibatch, batch_idx):
        batch, (x, y) = minibatch
        return fastis.cross_entropy(self.layer(x), y, batch.weights)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = torch.utils.data.TensorDataset(torch.randn(200, 5), torch.randint(3, (200,)))
callback = ImportanceSampling(adjust_lr=True)
trainer = pytorch_lightning.Trainer(
    max_epochs=3, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
)
trainer.fit(Module(), fastis.DataLoader(data, fastis.Sampler(200, 10)))
assert callback.sampler.step == 60
assert trainer.optimizers[0].param_groups[0]["lr"] != 0.1
"""


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_the_library_by_its_older_name(alone):
    pytest.importorskip("pytorch_lightning")
    code = OLDER_NAME.format(alone=alone)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Loggers ------------------------------------------------------------------------------------------


def rows_of(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def test_stats_go_to_the_logger(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = ImportanceSampling(log_every_n_steps=25, adjust_lr=True)
    module, monitor = Module(), LearningRateMonitor("step")
    trainer = make_trainer(callback, monitor, logger=logger, log_every_n_steps=1)
    trainer.fit(module)
    logged = [row for row in rows_of(logger) if row["fastis/step"]]
    assert [int(row["step"]) for row in logged] == [24, 49, 74, 99]
    assert [float(row["fastis/step"]) for row in logged] == [25, 50, 75, 100]
    stats = callback.sampler.stats()
    last = {name: float(logged[-1][f"fastis/{name}"]) for name in stats}
    assert last == pytest.approx(stats, rel=1e-5)
    assert monitor.lrs["lr-SGD"] == module.rates, "with the factor"


@pytest.mark.parametrize(("every", "count"), [(None, 10), (0, 0)])
def test_how_often(tmp_path, every, count):
    logger = CSVLogger(tmp_path)
    callback = ImportanceSampling(log_every_n_steps=every)
    trainer = make_trainer(callback, logger=logger, log_every_n_steps=5, accumulate_grad_batches=2)
    trainer.fit(Module())
    rows = rows_of(logger) if count else []
    assert sum(bool(row.get("fastis/step")) for row in rows) == count


def test_the_gain_is_in_the_progress_bar():
    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, *args):
            shown.append(self.get_metrics(trainer, trainer.lightning_module).get("gain"))

    shown: list = []
    callback = ImportanceSampling(log_every_n_steps=1)
    make_trainer(callback, Bar(), enable_progress_bar=True).fit(Module())
    assert shown[-1] == pytest.approx(callback.sampler.stats()["gain"])
    assert shown[-1] != 1


# What is refused ----------------------------------------------------------------------------------


def raises(kind, match, *, callback=None, module=None, fit=None, **arguments):
    module = Module() if module is None else module
    with pytest.raises(kind, match=match):
        trained(module, fit, callback, **arguments)
    assert "training_step" not in vars(module), "as it was"


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"adjust_lr": "yes"}, TypeError, "adjust_lr must be a bool or a dict, got str"),
        ({"log_every_n_steps": -1}, ValueError, "log_every_n_steps must be at least 0"),
        ({"uniform_from": 1.5}, ValueError, "uniform_from must be"),
    ],
)
def test_bad_arguments(arguments, kind, match):
    with pytest.raises(kind, match=match):
        ImportanceSampling(**arguments)


def test_trainers_that_would_choose_other_samples():
    raises(ValueError, "overfit_batches must be 0, got 2", overfit_batches=2)
    match = "reload_dataloaders_every_n_epochs must be 0, got 1"
    raises(ValueError, match, reload_dataloaders_every_n_epochs=1)
    match = "uniform_from must be None, got 0.5, for a Trainer without"
    endless = {"max_epochs": -1, "max_time": {"seconds": 5}}
    raises(ValueError, match, callback=ImportanceSampling(uniform_from=0.5), **endless)


def test_the_training_data_must_be_the_samplers():
    plain = torch.utils.data.DataLoader(DATA, B)
    for loaders, got in ((plain, "DataLoader"), ([make_loader(), make_loader()], "DataLoader, ")):
        match = rf"train_dataloader must have one fastis\.DataLoader, got {got}"
        raises(TypeError, match, fit={"train_dataloaders": loaders})


def test_another_loader_may_stand_beside_it():
    class Both(Module):
        def training_step(self, minibatches, batch_idx):
            assert len(minibatches["plain"]) == 3
            return self.scored(minibatches["ours"])

    loaders = {"plain": torch.utils.data.DataLoader(DATA, B), "ours": make_loader()}
    assert_same(*trained(Both(), {"train_dataloaders": loaders}), by_hand())


def test_an_update_that_would_count_twice():
    class Twice(Module):
        def training_step(self, minibatch, batch_idx):
            out = self.scored(minibatch)
            self.trainer.train_dataloader.sampler.update(minibatch[0], out)
            return out

    raises(RuntimeError, "either return the ScoredLoss or call", module=Twice())


def test_a_minibatch_without_its_batch():
    class Dropping(Module):
        def on_after_batch_transfer(self, minibatch, dataloader_idx):
            return minibatch[1]

        def training_step(self, minibatch, batch_idx):
            return fastis.cross_entropy(self.layer(minibatch[0]), minibatch[1], torch.ones(B))

    raises(TypeError, r"must get the fastis\.Batch with its data", module=Dropping())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_coefficients_that_are_converted(precision):
    raises(TypeError, "precision must leave the coefficients as they are", precision=precision)


def test_a_sampler_that_never_learns_is_heard():
    class Silent(Module):
        def training_step(self, minibatch, batch_idx):
            return self.scored(minibatch).loss

    with pytest.warns(UserWarning, match="minibatches drawn and no update so far"):
        trained(Silent())


def test_an_error_in_the_step_leaves_the_module_as_it_was():
    class Failing(Module):
        def training_step(self, minibatch, batch_idx):
            raise ArithmeticError("mine")

    raises(ArithmeticError, "mine", module=Failing())


@pytest.mark.parametrize(
    ("group", "trainer", "callback", "match"),
    [
        (None, {}, {}, "use_distributed_sampler must be False in 2 processes, got True"),
        (None, {"use_distributed_sampler": False}, {}, "group must be given where torch"),
        (
            False,
            {"use_distributed_sampler": False},
            {"adjust_lr": True},
            "adjust_lr must be False for samplers of their own",
        ),
    ],
    ids=["the trainer's sampler", "no group", "factors of their own"],
)
def test_two_processes(group, trainer, callback, match):
    """Real ones."""
    raises(
        Exception,
        match,
        fit={"train_dataloaders": make_loader(group=group)},
        callback=ImportanceSampling(**callback),
        devices=2,
        strategy="ddp_fork",
        **trainer,
    )


def test_schedules_with_a_factor_already_are_refused():
    def wrapped(optimizer):
        schedule = fastis.EffectiveBatchLR(LambdaLR(optimizer, lambda t: 1.0), fastis.Sampler(9, 3))
        return [optimizer], [schedule]

    match = "scheduler must be one whose rates have no factor yet"
    raises(
        TypeError,
        match,
        module=Module(schedule=wrapped),
        callback=ImportanceSampling(adjust_lr=True),
    )
