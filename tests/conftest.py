"""Shared fixtures: the backends, minibatches, scores, factors made up, one thread."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastis

torch.set_num_threads(1)

# In the process that test_triton.py starts, the losses are tested with Triton's interpreter alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="for the process that test_in_the_interpreter starts"
)
LOSS_BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]

if INTERPRETED:
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        """Rounded once, as on a GPU; the interpreter's own is x * y + z in float32."""
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


@pytest.hookimpl(tryfirst=True)  # before that of xdist, which reads these options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spreads the whole suite over up to four cores where xdist is there and ``-n`` is not given.

    A few tests named on the command line start sooner in one process, and those of a GPU share it.
    """
    option, cores = config.option, len(os.sched_getaffinity(0))
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    whole = not named and "cuda" not in option.markexpr
    started = "PYTEST_XDIST_WORKER" in os.environ  # this is a worker, or was started by a test
    if not whole or started or cores == 1 or not config.pluginmanager.hasplugin("xdist"):
        return
    if option.numprocesses is None and option.dist == "no" and not option.usepdb:
        option.numprocesses, option.dist = min(cores, 4), "worksteal"


def _declare_operators_of_torchvision() -> None:
    """Lets a torchvision be imported that was built for another torch: timm needs no more of it.

    The index of packages has it for CUDA, and its library does not load beside a torch without.
    torchvision then goes on without its operators, but for some whose names it wants to exist.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    folder = Path(found.origin).parent
    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        text = (folder / "_meta_registrations.py").read_text()
        for name in re.findall(r'register_fake\("(torchvision::\w+)"\)', text):
            torch.library.define(name, "(Tensor a) -> Tensor")


_declare_operators_of_torchvision()


class Observation(NamedTuple):
    """What the sampler reads of a ScoredLoss."""

    losses: Tensor
    score: Tensor
    mean_grad: Tensor | None = None


def observe(score: Tensor, mean_grad: Tensor | None = None) -> Observation:
    return Observation(score, score, mean_grad)


def losses_of(*values: float) -> Observation:
    return observe(torch.tensor(values))


def batch_of(*indices: int) -> fastis.Batch:
    return fastis.Batch(torch.tensor(indices), torch.ones(len(indices)))


def scores(indices: Tensor) -> Tensor:
    """A score for every index, between 0.1 and about 5."""
    return 0.1 + 5 * torch.frac(indices * 0.6180339887).square().float()


def drive(sampler: fastis.Sampler, steps: int, seed: int = 0, decay: float = 0.0) -> list:
    """Runs the loop on lognormal scores (falling as exp(-decay t)); returns the minibatches."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        batch = sampler.sample()
        score = torch.empty(len(batch.indices)).log_normal_(0, 2, generator=generator)
        mean_grad = 0.1 * torch.randn(10, generator=generator)
        sampler.update(batch, observe(score * float(torch.tensor(-decay * step).exp()), mean_grad))
        batches.append(batch)
    return batches


def train(sampler: fastis.Sampler, steps: int) -> Tensor:
    """The loop with scores (and losses) that follow from the index; how often each was drawn."""
    value = scores(torch.arange(sampler.num_samples))
    counts = torch.zeros(sampler.num_samples)
    for _ in range(steps):
        batch = sampler.sample()
        i = batch.indices
        sampler.update(batch, Observation(value[i], value[i], torch.full((4,), 0.1)))
        counts.index_add_(0, i, torch.ones(len(i)))
    return counts


def sweep(sampler: fastis.Sampler, score: Tensor) -> None:
    """Observes every sample once, outside the draws."""
    n = sampler.num_samples
    sampler.update(fastis.Batch(torch.arange(n), torch.ones(n)), observe(score))


class FakeSampler:
    """A factor to be set, of which the square root is Adam's."""

    factor = 1.0
    asked: tuple[str, str] | None = None

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> Tensor:
        self.asked = (optimizer, rule)
        value = torch.tensor(self.factor, dtype=torch.float64)
        return value if optimizer == "sgd" else value.sqrt()


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2))]


def sgd(lr: float | Tensor = 0.5, groups: int = 1) -> torch.optim.SGD:
    """With rates lr, lr / 2, ...; if ``lr`` is a tensor, tensors of their own."""
    made = [{"params": parameters(), "lr": lr / 2**i} for i in range(groups)]
    return torch.optim.SGD(made, lr=0.5, momentum=0.9)


def rate(optimizer: torch.optim.Optimizer) -> float:
    """In force, of the first group."""
    return float(optimizer.param_groups[0]["lr"])


@pytest.fixture(autouse=True)
def _torch_is_seeded():
    """A sampler without a seed takes one from torch: every test the same one, alone or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["reference", "cpu"])
def any_backend(request):
    with fastis.backend(request.param):
        yield request.param


@pytest.fixture
def unwritten_memory_is_nan():
    """torch.empty fills with NaN while torch is to be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads_and_data(monkeypatch):
    """The jobs set the number of threads of the process; FASTIS_DATA is the user's."""
    monkeypatch.delenv("FASTIS_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def assert_equal(found, expected, where=""):
    """Nested dicts of tensors and plain values: the same to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_equal(found[name], value, f"{where}.{name}")
    elif isinstance(expected, torch.Tensor):
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (found, expected)]
        assert torch.equal(*bits), where
    else:
        assert found == expected, where
