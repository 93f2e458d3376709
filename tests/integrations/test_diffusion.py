"""Timesteps of diffusion models: in the place of improved-diffusion's schedule samplers."""

from __future__ import annotations

import copy
import io
import sys
import types
from abc import ABC
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from distributed.processes import run
from torch import Tensor, nn

import fastis
from fastis.integrations.diffusion import TimestepSampler
from fastis.methods import EMAIS

T = 50


def losses_of(t: Tensor, step: int = 0) -> Tensor:
    """Far larger for small t; other ones for other steps, and places in the minibatch."""
    places = torch.arange(len(t)) + 1
    noise = torch.frac((t + 1) * (step + 1) * places * 0.6180339887)
    return (1 + 200 * (t < 4)) * (0.5 + noise).double()


def learn(sampler: TimestepSampler, steps: int, size: int = 16, first: int = 0) -> list[Tensor]:
    """A loop; its timesteps and weights."""
    found = []
    for step in range(first, first + steps):
        t, weights = sampler.sample(size, "cpu")
        sampler.update_with_local_losses(t, losses_of(t, step))
        found.append(torch.stack([t.double(), weights.double()]))
    return found


def loss_second_moment(ts: Tensor, losses: Tensor, history: int = 10) -> np.ndarray:
    """What LossSecondMomentResampler draws in proportion to, all of whose histories are full."""
    kept: dict[int, list[float]] = {t: [] for t in range(T)}
    for t, loss in zip(ts.tolist(), losses.tolist(), strict=True):
        kept[t].append(loss)
    w = np.array([np.mean(np.square(x[-history:])) ** 0.5 for x in kept.values()])
    return 0.999 * w / w.sum() + 0.001 / T


def test_draws_what_loss_second_moment_resampling_does():
    """Of losses that vary within a timestep, but not with time."""
    sampler = TimestepSampler(T, method=EMAIS(floor=1e-3, tau_scale=1.0), seed=0)
    ts = torch.arange(T).repeat(10)
    losses = losses_of(ts) * torch.linspace(0.1, 1.9, 10).repeat_interleave(T)
    for _ in range(20):
        sampler.update_with_all_losses(ts.tolist(), losses.tolist())
    found = sampler.weights() / T
    # Theirs mixes in one part in a thousand of uniform draws.
    np.testing.assert_allclose(found, loss_second_moment(ts, losses), rtol=2e-3, atol=1e-3 / T)


def test_is_the_moving_second_moment_of_all_losses():
    """Repetitions of a timestep in a minibatch count, all of them."""
    sampler = TimestepSampler(T, method=EMAIS(tau=20.0, floor=1e-6, least_gain=0.0), seed=0)
    moments, last = np.full(T, np.nan), np.full(T, -1)
    for step, (t, _) in enumerate(batch.long() for batch in learn(sampler, 60)):
        squares = losses_of(t, step).square().numpy()
        for s in np.unique(t):
            new = squares[t.numpy() == s].mean()
            keep = 0.0 if last[s] < 0 else np.exp(-(step - last[s]) / 20)
            moments[s] = new if last[s] < 0 else keep * moments[s] + (1 - keep) * new
            last[s] = step
    assert (last >= 0).all()
    expected = np.sqrt(moments)
    np.testing.assert_allclose(sampler.weights(), expected / expected.mean(), rtol=1e-4)
    assert len(sampler.sample(16)[0].unique()) < 16, "some repeat"


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_draws_are_of_the_weights_whatever_the_size(scheme):
    sampler = TimestepSampler(T, scheme=scheme, seed=1)
    learn(sampler, 40)
    p = sampler.weights() / T
    counts, number = np.zeros(T), 0
    for size in (16, 5, 1, 40) * 100:
        t, weights = sampler.sample(size, "cpu")
        assert t.dtype == torch.int64
        assert weights.dtype == torch.float32
        assert t.shape == weights.shape == (size,)
        torch.testing.assert_close(
            weights.double(), torch.from_numpy(1 / (T * p))[t], rtol=1e-6, atol=0
        )
        counts += np.bincount(t, minlength=T)
        number += size
    assert (abs(counts - number * p) < 5 * np.sqrt(number * p)).all()
    assert counts[0] > 5 * counts[-1]


def test_the_place_in_a_minibatch_says_nothing_of_the_timestep():
    """Systematic draws come in the order of time: data that are sorted must not meet that."""
    sampler = TimestepSampler(T, seed=1)
    learn(sampler, 40)
    firsts = torch.cat([sampler.sample(16)[0][:1] for _ in range(400)])
    share = float((firsts < 4).double().mean())
    assert share == pytest.approx(sampler.weights()[:4].sum() / T, abs=0.1)


def test_starts_with_every_timestep():
    sampler = TimestepSampler(48, seed=0)
    t = torch.cat([sampler.sample(16, "cpu")[0] for _ in range(3)])
    assert t.sort().values.tolist() == list(range(48))


def test_more_draws_than_timesteps():
    sampler = TimestepSampler(8, seed=0)
    learn(sampler, 30, size=32)
    assert sampler.weights()[0] > 1 > sampler.weights()[-1] > 0


def test_losses_that_are_not_finite_or_negative():
    sampler = TimestepSampler(4, seed=0)
    nan, inf = float("nan"), float("inf")
    sampler.update_with_all_losses([0, 0, 0, 1, 2, 3], [nan, 1.0, 7.0, -2.0, inf, 1.0])
    assert sampler.sampler is not None
    assert sampler.sampler.skipped == 2
    assert sampler.sampler.mean.tolist() == [5.0, 2.0, 0.0, 1.0]


# ---- in a training loop


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * (1 + 9 * (t < 4)).view(-1, 1)


@pytest.fixture
def package() -> Iterator[types.ModuleType]:
    """One with the classes that the training loop asks for."""

    class ScheduleSampler(ABC):  # noqa: B024
        pass

    class LossAwareSampler(ScheduleSampler):
        pass

    resample = types.ModuleType("some_diffusion.resample")
    resample.LossAwareSampler = LossAwareSampler
    sys.modules[resample.__name__] = resample
    yield resample
    del sys.modules[resample.__name__]


def test_the_training_loop_takes_it_for_a_loss_aware_sampler(package):
    class Diffusion:
        num_timesteps = T
        __module__ = "some_diffusion.respace"

    class Derived(Diffusion):
        pass

    assert not issubclass(TimestepSampler, package.LossAwareSampler)
    TimestepSampler(T)
    assert not issubclass(TimestepSampler, package.LossAwareSampler)
    sampler = TimestepSampler(Derived())
    assert sampler.num_timesteps == T
    assert isinstance(sampler, package.LossAwareSampler)


def step_of(model: nn.Module, sampler: TimestepSampler, x: Tensor, scale: float = 1.0) -> Tensor:
    """improved-diffusion's forward_backward; the norms of the gradients at the output."""
    t, weights = sampler.sample(len(x), "cpu")
    output = model(x, t)
    losses = output.square().mean(1)
    sampler.update_with_local_losses(t, losses.detach())
    ((losses * weights).mean() * scale).backward()
    return torch.stack([t.double(), (2 / 3 * output.detach()).norm(dim=1).double()])


def test_learns_the_gradients_at_the_output(monkeypatch):
    model, x = Network(), torch.randn(20, 3)
    sampler = TimestepSampler(20, model=model, seed=0)
    t, norms = step_of(model, sampler, x)  # each timestep once
    assert sampler.sampler is not None
    torch.testing.assert_close(sampler.sampler.mean[t.long()].double(), norms)
    assert sampler.sampler.step == 1, "the losses beside them are left out"
    for _ in range(40):
        step_of(model, sampler, x)
    assert sampler.weights()[:4].min() > 2 * sampler.weights()[4:].max()
    seen = []
    monkeypatch.setattr(sampler, "_update", lambda *arguments: seen.append(arguments))
    t, norms = step_of(model, sampler, x)
    ((t_seen, scores, coefficients),) = seen
    assert torch.equal(t_seen.double(), t)
    assert coefficients.min() < 0.5, "the weights are taken out of the gradients"
    torch.testing.assert_close(scores, norms, rtol=1e-5, atol=0)


def test_gradients_are_taken_from_the_pass_that_is_trained():
    model, x = Network(), torch.randn(8, 3)
    sampler = TimestepSampler(20, model=model, seed=0)
    t, weights = sampler.sample(8, "cpu")
    copied = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    with torch.no_grad():
        model(x, t)  # an evaluation
    copied(x, t).sum().backward()
    model(x[:3], t[:3]).sum().backward()  # another minibatch
    assert sampler.sampler is not None
    assert sampler.sampler.step == 0
    loss = (model(x, t).square().mean(1) * weights).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    model(x, t).sum().backward()  # of no draw
    assert sampler.sampler.step == 1


def test_a_model_must_return_a_tensor():
    class Several(Network):
        def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return {"sample": super().forward(x, t)}

    model = Several()
    t, _ = TimestepSampler(T, model=model).sample(4)
    model(torch.randn(4, 3), t)  # its sampler is gone
    sampler = TimestepSampler(T, model=model)
    t, _ = sampler.sample(4)
    with pytest.raises(TypeError, match="model must return a tensor of floats, got dict"):
        model(torch.randn(4, 3), t)


# ---- state, and several processes


@pytest.mark.parametrize("steps", [0, 2, 30])
def test_goes_on_bit_for_bit(steps):
    sampler, other = TimestepSampler(T, seed=3), TimestepSampler(T)
    learn(sampler, steps)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    if steps:
        expected, found = learn(sampler, 20, 12, steps), learn(other, 20, 12, steps)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert other.sampler is not None or steps == 0


def in_group(group, sizes, state=None):
    sampler = TimestepSampler(T, seed=5)
    if state is not None:
        sampler.load_state_dict(state)
    drawn = learn(sampler, 30, sizes[group.rank()])
    return drawn, sampler.weights(), sampler.state_dict()


@pytest.mark.parametrize("sizes", [(16, 16), (16, 5)])
def test_processes_share_what_they_learn(tmp_path, sizes):
    (drawn, weights, state), (others, their_weights, _) = run(tmp_path, 2, in_group, sizes)
    assert np.array_equal(weights, their_weights)
    assert weights[0] > 5 * weights[-1]
    shortest = [
        (a[0, : min(sizes)], b[0, : min(sizes)]) for a, b in zip(drawn, others, strict=True)
    ]
    assert sum(torch.equal(a.sort().values, b.sort().values) for a, b in shortest) < 3
    everything = TimestepSampler(T, seed=5)
    for step, both in enumerate(zip(drawn, others, strict=True)):
        everything.sample(sizes[0])  # past the warm-up
        parts = [part[0].long() for part in both]
        losses = torch.cat([losses_of(t, step) for t in parts])
        everything.update_with_all_losses(torch.cat(parts), losses)
    np.testing.assert_allclose(everything.weights(), weights, rtol=1e-6)
    again = run(tmp_path, 2, in_group, sizes, state)
    assert np.array_equal(again[0][1], again[1][1])
    assert not torch.equal(again[0][0][-1][0][:5], again[1][0][-1][0][:5]), "from one rank's state"


def gradients_in_group(group):
    torch.manual_seed(0)
    model = Network()
    sampler = TimestepSampler(20, model=model, seed=5)
    torch.manual_seed(group.rank())
    for _ in range(20):
        step_of(model, sampler, torch.randn(8, 3))
    return sampler.weights()


def test_processes_share_their_gradients(tmp_path):
    first, second = run(tmp_path, 2, gradients_in_group)
    assert np.array_equal(first, second)
    assert first[0] > 2 * first[-1]


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"diffusion": 0}, ValueError, "diffusion.num_timesteps must be in"),
        ({"diffusion": "linear"}, TypeError, "diffusion.num_timesteps must be an int, got str"),
        ({"method": "loss"}, TypeError, "method must be a fastis.methods.EMAIS"),
        ({"method": fastis.methods.Uniform()}, TypeError, "method must be a fastis.methods.EMAIS"),
        ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module or None"),
        ({"scheme": "sorted"}, ValueError, "scheme must be one of"),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TimestepSampler(**{"diffusion": T, **arguments})


def test_wrong_minibatches():
    sampler = TimestepSampler(T, seed=0)
    with pytest.raises(ValueError, match="batch_size must be in"):
        sampler.sample(0, "cpu")
    learn(sampler, 3)
    before = sampler.state_dict()
    t = torch.arange(4)
    with pytest.raises(ValueError, match=r"local_losses must have shape \[4\], got \[3\]"):
        sampler.update_with_local_losses(t, torch.ones(3))
    with pytest.raises(TypeError, match="local_ts must have dtype"):
        sampler.update_with_local_losses(t.float(), torch.ones(4))
    with pytest.raises(ValueError, match=r"local_ts must be in \[0, 49\], got 47 to 50"):
        sampler.update_with_local_losses(t + 47, torch.ones(4))
    with pytest.raises(TypeError, match="local_losses must be a tensor, got list"):
        sampler.update_with_local_losses(t, [1.0] * 4)
    with pytest.raises(ValueError, match="ts must be at least 0, got -1"):
        sampler.update_with_all_losses([-1], [1.0])
    assert all(
        torch.equal(value, before["sampler"][name])
        for name, value in sampler.state_dict()["sampler"].items()
        if isinstance(value, Tensor)
    )


def test_wrong_states():
    sampler = TimestepSampler(T, seed=0)
    learn(sampler, 3)
    state, before = sampler.state_dict(), sampler.sampler
    with pytest.raises(TypeError, match="state must be a dict, got None"):
        sampler.load_state_dict(None)
    with pytest.raises(ValueError, match="state must have num_timesteps=50, got 60"):
        sampler.load_state_dict({**state, "num_timesteps": 60})
    with pytest.raises(ValueError, match="state must have the sampler's settings, got none"):
        sampler.load_state_dict({**state, "sampler": 3})
    other = TimestepSampler(T, method=EMAIS(floor=0.5), seed=9)
    with pytest.raises(ValueError, match="options"):
        other.load_state_dict(state)
    assert other.sampler is None
    fresh = TimestepSampler(T, method=EMAIS(floor=0.5), seed=9)
    assert torch.equal(other.sample(16)[0], fresh.sample(16)[0])
    assert sampler.sampler is before
