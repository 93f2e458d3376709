"""Loops as people have them: accumulation, mixed precision, compilation, fused optimizers,
clipping, averaged weights, early stopping, evaluation passes; all of it together, interrupted.

Schedulers have files of their own (test_lr*.py), and so have loaders (test_data*.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import fastis
from fastis.kernels.layout import LAST
from fastis.methods import EMAIS

N, B, C = 320, 16, 4


@pytest.fixture(scope="module")
def data():
    """Classes of which some samples are far harder than others."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(C, (N,), generator=generator)
    noise = torch.rand(N, 1, generator=generator).pow(4) * 4
    x = torch.randn(N, 8, generator=generator) * (0.3 + noise)
    x[torch.arange(N), y] += 1
    return x, y


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, C)).to(
        dtype
    )


def parameters_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


class Loop:
    """A model in training; ``step`` is one iteration, whose gradient ``backward`` makes."""

    def __init__(self, data, dtype=torch.float32, optimizer=None, **options) -> None:
        x, self.y = data
        self.x, self.model = x.to(dtype), network(dtype)
        make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        self.optimizer = make(self.model.parameters())
        self.sampler = fastis.Sampler(N, B, seed=3, **options)
        self.scheduler = fastis.EffectiveBatchLR(self.optimizer, self.sampler, max_factor=3.0)

    def loss(self, i, r, **options) -> fastis.ScoredLoss:
        return fastis.cross_entropy(self.model(self.x[i]), self.y[i], r, **options)

    def backward(self, batch: fastis.Batch) -> None:
        out = self.loss(*batch)
        self.sampler.update(batch, out)
        out.backward()

    def run(self, steps: int) -> torch.Tensor:
        for _ in range(steps):
            self.backward(self.sampler.sample())
            self.finish()
        return parameters_of(self.model)

    def finish(self) -> None:
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def train_loss(self) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(self.model(self.x), self.y))


# Accumulation ------------------------------------------------------------------------------------


class Accumulating(Loop):
    def backward(self, batch):
        parts = []
        for i, r in zip(batch.indices.chunk(4), batch.weights.chunk(4), strict=True):
            out = self.loss(i, r, denominator=len(batch.indices))
            out.backward()
            parts.append(out)
        self.sampler.update(batch, parts)


class DividedByTheTrainer(Loop):
    """Each part's own mean, over the number of parts: as Lightning, Accelerate and timm have it."""

    def backward(self, batch):
        parts = [
            self.loss(i, r)
            for i, r in zip(batch.indices.chunk(4), batch.weights.chunk(4), strict=True)
        ]
        for out in parts:
            (out.loss / len(parts)).backward()
        self.sampler.update(batch, parts)


@pytest.mark.parametrize("kind", [Accumulating, DividedByTheTrainer])
def test_accumulation_is_the_whole_minibatch(data, kind):
    whole, parts = Loop(data, torch.float64), kind(data, torch.float64)
    torch.testing.assert_close(parts.run(80), whole.run(80), rtol=1e-9, atol=1e-9)
    assert parts.sampler.step == whole.sampler.step == 80
    assert torch.equal(parts.sampler.last_seen, whole.sampler.last_seen)
    n_ems = [float(loop.sampler.variance.effective_batch_size) for loop in (parts, whole)]
    assert n_ems[0] == pytest.approx(n_ems[1], rel=1e-6)
    assert n_ems[1] > 1.05 * B


# Mixed precision ---------------------------------------------------------------------------------


class Scaled(Loop):
    """float16 with a scale that is far too large at first: steps are skipped until it fits."""

    def __init__(self, data) -> None:
        super().__init__(data)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10**6)
        self.skipped = []

    def backward(self, batch):
        with torch.autocast("cpu", dtype=torch.float16):
            out = self.loss(*batch)
        assert out.loss.dtype == out.score.dtype == torch.float32
        self.sampler.update(batch, out)
        self.scaler.scale(out.loss).backward()

    def finish(self):
        before, scale = parameters_of(self.model), self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        skipped = self.scaler.get_scale() < scale
        assert torch.equal(before, parameters_of(self.model)) == skipped
        self.skipped.append(skipped)


def test_a_skipped_step_still_updates_the_table(data):
    loop = Scaled(data)
    first = loop.sampler.sample()
    loop.backward(first)
    loop.finish()
    assert loop.skipped == [True]
    assert loop.sampler.step == 1
    seen = (loop.sampler.last_seen == 0).nonzero().flatten()
    assert torch.equal(seen, first.indices.sort().values)
    before = loop.train_loss()
    loop.run(100)
    assert 2 <= sum(loop.skipped) < 20
    assert loop.sampler.step == 101
    assert loop.sampler.skipped == 0, "scores know nothing of the scale"
    assert loop.train_loss() < 0.8 * before


# torch.compile -----------------------------------------------------------------------------------


class Compiled(Loop):
    def __init__(self, data, backend: str) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend  # seconds

        super().__init__(data)
        self.graphs = CompileCounterWithBackend(backend)
        torch._dynamo.reset()

        def forward(x, y, weights):
            return fastis.cross_entropy(self.model(x), y, weights)

        self.compiled = torch.compile(forward, fullgraph=True, backend=self.graphs)

    def loss(self, i, r):
        return self.compiled(self.x[i], self.y[i], r)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_model_and_loss_compiled_together(data, backend):
    eager, compiled = Loop(data), Compiled(data, backend)
    torch.testing.assert_close(compiled.run(60), eager.run(60), rtol=1e-4, atol=1e-5)
    assert compiled.graphs.frame_count == 1, "compiled once, not for every minibatch"
    assert compiled.sampler.step == 60
    assert torch.equal(compiled.sampler.last_seen, eager.sampler.last_seen)


# Optimizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_with_a_rate_that_is_a_tensor(data, name):
    cls = getattr(torch.optim, name)
    plain = Loop(data, optimizer=lambda p: cls(p, lr=0.01))
    expected = plain.run(60)
    lr = torch.tensor(0.01)
    fused = Loop(data, optimizer=lambda p: cls(p, lr=lr, fused=True))
    torch.testing.assert_close(fused.run(60), expected, rtol=1e-3, atol=1e-4)
    (group,) = fused.optimizer.param_groups
    assert group["lr"] is lr, "where a graph would look for it"
    assert float(lr) == pytest.approx(plain.optimizer.param_groups[0]["lr"], rel=1e-4)
    assert float(lr) > 0.01001, "the factor is in it"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_capturable_optimizer_reads_nothing_back(data):
    x, y = (t.cuda() for t in data)
    lr = torch.tensor(0.01, device="cuda")
    loop = Loop(
        (x, y), optimizer=lambda p: torch.optim.Adam(p, lr=lr, capturable=True), device="cuda"
    )
    loop.model.cuda()
    loop.run(45)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.run(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.optimizer.param_groups[0]["lr"] is lr
    assert float(lr) > 0.01001


# Clipping, averaged weights, early stopping, evaluation ------------------------------------------


def test_clipping_sees_the_weighted_gradient(data):
    loop = Loop(data)
    loop.run(60)
    batch = loop.sampler.sample()
    assert not (batch.weights == 1).all()
    losses = F.cross_entropy(
        loop.model(data[0][batch.indices]), data[1][batch.indices], reduction="none"
    )
    (losses * batch.weights).mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e9)
    loop.optimizer.zero_grad()
    loop.backward(batch)
    norm = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
    torch.testing.assert_close(norm, expected)
    clipped = torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e9)
    assert float(clipped) == pytest.approx(1e-3, rel=1e-2)


def test_averaged_weights_are_torchs(data):
    """An average of the weights has no part in sampling: it may be evaluated and saved as any."""
    loop, twin = Loop(data), Loop(data)
    averaged = AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected = None
    for _ in range(30):
        after = loop.run(1)
        averaged.update_parameters(loop.model)
        expected = after.clone() if expected is None else expected.lerp(after, 0.1)
    torch.testing.assert_close(parameters_of(averaged.module), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(parameters_of(loop.model), twin.run(30))


def evaluate(loop: Loop, model: torch.nn.Module) -> float:
    """The mean loss of the training set, from which the table learns."""
    total = 0.0
    for i in torch.arange(N).split(50):
        with torch.no_grad():
            out = fastis.cross_entropy(model(loop.x[i]), loop.y[i])
        loop.sampler.refresh(i, out)
        total += float(out.losses.sum())
    return total / N


def test_evaluation_passes_leave_step_and_rate_alone(data):
    loop = Loop(data)
    loop.run(100)
    before = (*loop.scheduler.get_last_lr(), loop.sampler.step, loop.sampler.stats()["gain"])
    assert evaluate(loop, loop.model) == pytest.approx(loop.train_loss(), rel=1e-5)
    loop.scheduler.step()
    assert (
        *loop.scheduler.get_last_lr(),
        loop.sampler.step,
        loop.sampler.stats()["gain"],
    ) == before
    assert bool((loop.sampler._table.column(LAST) == 100).all())


def test_what_an_evaluation_pass_teaches(data):
    loop = Loop(data, method=EMAIS(warmup_epochs=0))
    evaluate(loop, loop.model)
    with torch.no_grad():
        gradients = loop.model(loop.x).softmax(1) - F.one_hot(loop.y, C)
    torch.testing.assert_close(loop.sampler.mean, gradients.norm(dim=1), rtol=1e-4, atol=1e-5)
    first = loop.sampler.sample()
    assert not (first.weights == 1).all()


def test_early_stopping_returns_to_the_best(data, tmp_path):
    loop, path, best, wait = Loop(data), tmp_path / "best.pt", float("inf"), 0
    parts = {"model": loop.model, "optimizer": loop.optimizer, "scheduler": loop.scheduler}
    parts["sampler"] = loop.sampler
    for epoch in range(100):
        loop.run(N // B)
        error = loop.train_loss() + 0.1 * epoch  # gets worse in the end
        if error < best:
            best, wait = error, 0
            fastis.save_checkpoint(path, **parts, epoch=epoch)
            kept = parameters_of(loop.model), loop.sampler.state_dict()
        elif (wait := wait + 1) == 3:
            break
    assert epoch < 50
    assert fastis.load_checkpoint(path, **parts)["epoch"] == epoch - 3
    assert torch.equal(parameters_of(loop.model), kept[0])
    assert torch.equal(loop.sampler.state_dict()["states"], kept[1]["states"])
    loop.run(5)


# All of it ---------------------------------------------------------------------------------------


class Everything:
    """A script as it grows in the course of a year."""

    def __init__(self, data) -> None:
        x, y = data
        self.model = network()
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=torch.tensor(0.01), fused=True
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=8)
        self.sampler = fastis.Sampler(N, B, seed=3)
        self.loader = fastis.DataLoader(TensorDataset(x, y, torch.arange(N)), self.sampler)
        parts = [
            LinearLR(self.optimizer, 0.1, total_iters=5),
            CosineAnnealingLR(self.optimizer, 95),
        ]
        schedule = SequentialLR(self.optimizer, parts, [5])
        self.scheduler = fastis.EffectiveBatchLR(schedule, self.sampler, max_factor=3.0)
        self.kept = {
            name: getattr(self, name)
            for name in ("model", "averaged", "optimizer", "scaler", "scheduler", "loader")
        }

    def run(self, steps: int, done: int = 0, save_at: int | None = None, path=None) -> None:
        while done < steps:
            for batch, minibatch in self.loader:
                self.step(batch, *minibatch)
                done += 1
                if done == save_at:
                    fastis.save_checkpoint(path, **self.kept, done=done)
                if done == steps:
                    return

    def step(self, batch, x, y, index) -> None:
        outs = []
        for part in torch.arange(B).chunk(2):
            with torch.autocast("cpu", dtype=torch.float16):
                logits = self.model(x[part])
            out = fastis.cross_entropy(logits, y[part], batch.weights[part], denominator=B)
            self.scaler.scale(out.loss).backward()
            outs.append(out)
        self.sampler.update(batch, outs, indices=index)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.averaged.update_parameters(self.model)
        self.scheduler.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("interrupted_at", [2, 45, 60])
def test_everything_together_resumes_bit_for_bit(data, tmp_path, interrupted_at):
    """Among the skipped steps, in an epoch, and at the end of one."""
    path = tmp_path / "last.pt"
    through = Everything(data)
    through.run(100, save_at=interrupted_at, path=path)
    resumed = Everything(data)
    done = fastis.load_checkpoint(path, **resumed.kept)["done"]
    assert done == interrupted_at
    resumed.run(100, done)
    for ours, theirs in ((resumed.model, through.model), (resumed.averaged, through.averaged)):
        assert torch.equal(parameters_of(ours), parameters_of(theirs))
    assert torch.equal(
        resumed.sampler.state_dict()["states"], through.sampler.state_dict()["states"]
    )
    assert resumed.scaler.state_dict() == through.scaler.state_dict()
    assert resumed.scheduler.get_last_lr() == through.scheduler.get_last_lr()
    assert through.sampler.step == 100
    assert copy.deepcopy(through.sampler).step == 100
