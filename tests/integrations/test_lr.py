"""EffectiveBatchLR in the loops of Lightning, Accelerate, Hugging Face's Trainer and timm."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import FakeSampler, parameters, rate, sgd
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import fastis

STEPS = 12
FACTORS = [1.0, 1.5, 3.0, 2.0]


class Cycling(FakeSampler):
    """Another factor at every step, and the same again in a run that is resumed."""

    def __init__(self, asked=0):
        self.count = asked

    def lr_factor(self, optimizer="sgd", rule="linear"):
        self.factor = FACTORS[self.count % len(FACTORS)]
        self.count += 1
        return super().lr_factor(optimizer, rule)


def cosine(step, steps=STEPS, base=0.5):
    return base * (1 + math.cos(math.pi * step / steps)) / 2


def expected_rates(steps):
    """In force at each of the optimizer's steps: the first is before any step of the schedule."""
    factors = [1.0] + [FACTORS[t % len(FACTORS)] for t in range(steps - 1)]
    return [cosine(t) * factors[t] for t in range(steps)]


# Lightning ----------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip("lightning")


def lightning_module(lightning, sampler, make):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            self.rates = []

        def training_step(self, batch, _):
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            return {"optimizer": optimizer, "lr_scheduler": make(optimizer, sampler)}

        def on_before_optimizer_step(self, optimizer):
            self.rates.append(rate(optimizer))

    return Module()


def trainer(lightning, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        accelerator="cpu", enable_model_summary=False, **{**quiet, **options}, max_epochs=-1
    )


def examples(n=48, batch_size=4):
    return DataLoader(TensorDataset(torch.ones(n, 3)), batch_size)


def at_every_step(optimizer, sampler):
    schedule = fastis.EffectiveBatchLR(CosineAnnealingLR(optimizer, STEPS), sampler)
    return {"scheduler": schedule, "interval": "step"}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_steps_it_at_every_step(lightning, accumulated):
    module = lightning_module(lightning, Cycling(), at_every_step)
    run = trainer(lightning, max_steps=STEPS, accumulate_grad_batches=accumulated)
    run.fit(module, examples())
    assert module.rates == pytest.approx(expected_rates(STEPS))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_saves_and_restores_it(lightning, tmp_path):
    module = lightning_module(lightning, Cycling(), at_every_step)
    run = trainer(lightning, max_steps=5)
    run.fit(module, examples())
    run.save_checkpoint(tmp_path / "at_5.ckpt")
    other = lightning_module(lightning, Cycling(asked=5), at_every_step)
    trainer(lightning, max_steps=STEPS).fit(other, examples(), ckpt_path=tmp_path / "at_5.ckpt")
    assert module.rates + other.rates == pytest.approx(expected_rates(STEPS))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_gives_a_plateau_scheduler_its_metric(lightning):
    def make(optimizer, sampler):
        plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, threshold_mode="abs")
        schedule = fastis.EffectiveBatchLR(plateau, sampler)
        return {"scheduler": schedule, "reduce_on_plateau": True, "monitor": "loss"}

    sampler = FakeSampler()
    sampler.factor = 2.0
    module = lightning_module(lightning, sampler, make)
    trainer(lightning, max_steps=6).fit(module, examples(8, 4))  # three epochs of two steps
    assert module.rates == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.1, 0.1])


def test_lightnings_optimizer_is_looked_through(lightning):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    adam = torch.optim.Adam(parameters(), lr=0.5)
    scheduler = fastis.EffectiveBatchLR(LightningOptimizer(adam), Cycling())
    assert scheduler.optimizer is adam


# Accelerate ---------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    """Makes one, which thinks of itself as one of ``processes``."""
    accelerate = pytest.importorskip("accelerate")
    state = accelerate.state

    def make(processes=1, split_batches=False, **options):
        config = accelerate.DataLoaderConfiguration(split_batches=split_batches)
        made = accelerate.Accelerator(cpu=True, dataloader_config=config, **options)
        state.PartialState._shared_state["num_processes"] = processes
        return made

    yield make
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()


@pytest.mark.parametrize("prepared_first", [False, True])
@pytest.mark.parametrize(("processes", "split"), [(1, False), (2, False), (2, True)])
def test_accelerate_steps_it_once_for_each_process(accelerator, processes, split, prepared_first):
    """Whether it is wrapped around the schedule before ``prepare``, or after."""
    made = accelerator(processes, split)
    optimizer, sampler = sgd(), FakeSampler()
    schedule = CosineAnnealingLR(optimizer, 2 * STEPS)
    if prepared_first:
        wrapped, schedule = made.prepare(optimizer, schedule)
        scheduler = made.prepare(fastis.EffectiveBatchLR(schedule, sampler))
    else:
        wrapped, scheduler = made.prepare(optimizer, fastis.EffectiveBatchLR(schedule, sampler))
    each = 1 if split else processes
    for step in range(1, STEPS + 1):
        sampler.factor = 1.0 + step
        wrapped.step()
        scheduler.step()
        assert rate(optimizer) == pytest.approx(cosine(each * step, 2 * STEPS) * sampler.factor)


def test_accelerate_steps_it_when_the_optimizer_is(accelerator):
    made = accelerator(gradient_accumulation_steps=2)
    optimizer, sampler = sgd(), FakeSampler()
    sampler.factor = 2.0
    inner = OneCycleLR(optimizer, 1.0, 4)
    start = rate(optimizer)
    wrapped, scheduler = made.prepare(optimizer, fastis.EffectiveBatchLR(inner, sampler))
    for part in range(20):  # Accelerate stops at the schedule's total, which it asks for
        with made.accumulate():
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
        if part == 0:
            assert rate(optimizer) == start
    assert inner.last_epoch > 1
    (unscaled,) = inner.get_last_lr()
    assert rate(optimizer) == 2 * unscaled


def test_accelerates_optimizer_is_looked_through(accelerator):
    """As in Hugging Face's Trainer, which makes the schedule after ``prepare``."""
    adam = torch.optim.AdamW(parameters(), lr=0.5)
    wrapped = accelerator().prepare(adam)
    sampler = FakeSampler()
    sampler.factor = 4.0
    for given in (wrapped, CosineAnnealingLR(wrapped, STEPS)):
        scheduler = fastis.EffectiveBatchLR(given, sampler)
        assert scheduler.optimizer is adam
        wrapped.step()
        scheduler.step()
        assert rate(adam) == pytest.approx(2 * scheduler.get_unscaled_lr()[0])


def test_accelerate_saves_and_restores_it(accelerator, tmp_path):
    def make():
        optimizer, sampler = sgd(), FakeSampler()
        sampler.factor = 3.0
        scheduler = fastis.EffectiveBatchLR(CosineAnnealingLR(optimizer, STEPS), sampler)
        made = accelerator()
        return made, optimizer, *made.prepare(optimizer, scheduler)

    first, optimizer, wrapped, scheduler = make()
    for _ in range(3):
        wrapped.step()
        scheduler.step()
    first.save_state(tmp_path)
    second, other, again, resumed = make()
    second.load_state(tmp_path)
    for _ in range(3):
        assert rate(other) == rate(optimizer)
        for pair in ((wrapped, scheduler), (again, resumed)):
            for part in pair:
                part.step()
    assert rate(other) == pytest.approx(3 * cosine(6))


# Hugging Face -------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


@pytest.fixture
def hf_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        rates: list[float]

        def create_scheduler(self, num_training_steps, optimizer=None):
            schedule = super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = fastis.EffectiveBatchLR(schedule, self.sampler)
            return self.lr_scheduler

        def training_step(self, *args, **kwargs):
            self.rates.append(rate(self.optimizer))
            return super().training_step(*args, **kwargs)

    def make(sampler, steps=STEPS):
        options = transformers.TrainingArguments(
            tmp_path,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=0.5,
            lr_scheduler_type="cosine",
            optim="sgd",
            save_steps=5,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"x": torch.ones(3), "labels": 0.0}] * 48
        made = Trainer(model=Model(), args=options, train_dataset=rows)
        made.sampler, made.rates = sampler, []
        return made

    return make


def test_hugging_faces_trainer_steps_it(hf_trainer):
    trainer = hf_trainer(Cycling())
    trainer.train()
    assert trainer.rates == pytest.approx(expected_rates(STEPS))
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx(trainer.rates)


def test_hugging_faces_trainer_resumes_it(hf_trainer):
    trainer = hf_trainer(Cycling())
    trainer.train()
    other = hf_trainer(Cycling(asked=5))
    other.train(resume_from_checkpoint=str(trainer.args.output_dir) + "/checkpoint-5")
    assert other.rates == pytest.approx(expected_rates(STEPS)[5:])


# timm ---------------------------------------------------------------------------------------------


@pytest.fixture
def timm():
    optim, scheduler = (pytest.importorskip(f"timm.{name}") for name in ("optim", "scheduler"))
    return optim, scheduler


@pytest.mark.parametrize(
    ("name", "by_epochs"),
    [
        *((name, by) for name in ("cosine", "tanh", "poly", "step") for by in (True, False)),
        ("plateau", True),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:PlateauLRScheduler")
def test_timms_loop(timm, name, by_epochs):
    """The unscaled rates are those of the schedule alone; every update renews the factor."""

    def make():
        optimizer = sgd()
        schedule, epochs = timm[1].create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=6,
            warmup_epochs=1,
            warmup_lr=0.05,
            min_lr=0.01,
            cooldown_epochs=0,
            decay_epochs=2,
            patience_epochs=0,
            step_on_epochs=by_epochs,
            updates_per_epoch=3,
        )
        return optimizer, schedule, epochs

    (plain, alone, epochs), (wrapped, inner, _) = make(), make()
    sampler = FakeSampler()
    scheduler = fastis.EffectiveBatchLR(inner, sampler)
    updates, seen = 0, set()
    for epoch in range(epochs):
        for _ in range(3):
            plain.step()
            wrapped.step()
            updates += 1
            sampler.factor = 1.0 + updates % 4
            for each in (alone, scheduler):
                each.step_update(num_updates=updates, metric=1.0)
            assert rate(wrapped) == pytest.approx(rate(plain) * sampler.factor)
        for each in (alone, scheduler):
            each.step(epoch + 1, 0.5)
        assert scheduler.get_unscaled_lr() == [rate(plain)]
        seen.add(rate(plain))
    assert len(seen) > 2
    scheduler.load_state_dict(scheduler.state_dict())


def test_timms_optimizers(timm):
    sampler = FakeSampler()
    for name, family in (
        ("sgdw", "sgd"),
        ("adamp", "adam"),
        ("nadamw", "adam"),
        ("adafactor", "adam"),
    ):
        optimizer = timm[0].create_optimizer_v2(Model(), opt=name, lr=0.5)
        fastis.EffectiveBatchLR(optimizer, sampler).step()
        assert sampler.asked[0] == family
    for name in ("lamb", "lion", "adan", "muon"):
        optimizer = timm[0].create_optimizer_v2(Model(), opt=name, lr=0.5)
        with pytest.raises(
            ValueError, match=r"must be given as 'sgd' .* whose family is not known"
        ):
            fastis.EffectiveBatchLR(optimizer, sampler)
        fastis.EffectiveBatchLR(optimizer, sampler, optimizer="adam").step()
