"""Diffusion timesteps: fastis' sampler against uniform draws and loss-second-moment resampling.

    python bench/experiments/timesteps.py probe --json bench/results/timesteps.jsonl
    python bench/experiments/timesteps.py compare --json bench/results/timesteps.jsonl
    python bench/experiments/timesteps.py costs --json bench/results/timesteps.jsonl
    python bench/experiments/timesteps_page.py

``probe`` trains with uniform timesteps while the samplers look on, and computes the variance of one
draw's gradient of all parameters under each one's probabilities. ``compare`` trains with each
sampler, every schedule decayed to its own number of steps; runs that the file has already are left
out. ``costs`` is the processor time of a training step, on one thread, with the samplers taking
turns. Without ``--data`` the images are the subset of Fashion-MNIST in bench/data.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

from bench.experiments.datasets import data_name
from bench.experiments.diffusion import OBJECTIVES, SCHEDULES, Diffusion, Images, Mixer, load_images
from bench.provenance import provenance
from bench.report import Row, append_row, make_parser, read_rows
from bench.timing import interleaved, thread
from fastis.estimators import population_traces
from fastis.integrations.diffusion import FLOOR, TimestepSampler
from fastis.methods import EMAIS

METHODS = (
    "uniform",
    "loss-second-moment",
    "loss-second-moment of 2",
    "fastis by loss",
    "fastis by gradient",
)
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = 3
IMAGES_A_STEP = 16  # of the probe, half of them to find probabilities by
TEST_IMAGES_A_STEP = 4


class LossSecondMoment:
    """improved-diffusion's LossSecondMomentResampler, of its formulas: p ~ sqrt(E[loss^2]).

    The last ``history`` losses of each timestep; uniform until all have that many.
    """

    def __init__(
        self, num_timesteps: int, seed: int, history: int = 10, uniform_part: float = 0.001
    ) -> None:
        self._losses = np.zeros((num_timesteps, history))
        self._counts = np.zeros(num_timesteps, dtype=np.int64)
        self._uniform_part, self._generator = uniform_part, np.random.default_rng(seed)

    def weights(self) -> NDArray[np.float64]:
        steps, history = self._losses.shape
        if (self._counts < history).any():
            return np.ones(steps)
        root = np.sqrt(np.square(self._losses).mean(1))
        return (1 - self._uniform_part) * root * (steps / root.sum()) + self._uniform_part

    def sample(self, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
        weights = self.weights()
        steps = len(weights)
        t = self._generator.choice(steps, batch_size, p=weights / weights.sum())
        r = weights.sum() / (steps * weights[t])
        return torch.from_numpy(t).to(device), torch.from_numpy(r).float().to(device)

    def update_with_local_losses(self, ts: Tensor, losses: Tensor) -> None:
        for t, loss in zip(ts.tolist(), losses.tolist(), strict=True):
            self._losses[t] = np.append(self._losses[t, 1:], loss)
            self._counts[t] += 1


class Uniform:
    """What all of them use without a schedule sampler."""

    def __init__(self, num_timesteps: int) -> None:
        self._steps = num_timesteps

    def sample(self, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
        return torch.randint(self._steps, (batch_size,), device=device), torch.ones(batch_size)

    def update_with_local_losses(self, ts: Tensor, losses: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Config:
    """One run."""

    method: str
    lr: float
    seed: int
    steps: int
    objective: str = "vlb"
    schedule: str = "linear"
    num_timesteps: int = 1000
    batch_size: int = 32
    width: int = 48
    dataset: str = "fashion_mnist"
    data: str = "embedded"


def sampler_of(config: Config, model: nn.Module) -> Any:
    steps, seed = config.num_timesteps, config.seed
    if config.method == "uniform":
        return Uniform(steps)
    if config.method.startswith("loss-second-moment"):
        return LossSecondMoment(steps, seed, history=2 if config.method.endswith("2") else 10)
    by_gradient = config.method == "fastis by gradient"
    return TimestepSampler(steps, model=model if by_gradient else None, seed=seed)


class Run:
    """A model in training: Adam, its rate falling linearly to 0, as improved-diffusion anneals."""

    def __init__(self, config: Config, images: Images) -> None:
        torch.manual_seed(config.seed)
        self.config, self.images = config, images
        self.diffusion = Diffusion(config.num_timesteps, config.schedule)
        self.model = Mixer(images.train.shape[1], config.num_timesteps, config.width)
        self.sampler = sampler_of(config, self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.0, total_iters=config.steps
        )
        self._generator = torch.Generator().manual_seed(config.seed)  # images and noise

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps, losses, and gradients at the output but for the weights."""
        train, size = self.images.train, self.config.batch_size
        x = train[torch.randint(len(train), (size,), generator=self._generator)]
        noise = torch.randn(x.shape, generator=self._generator)
        t, weights = self.sampler.sample(size, "cpu")
        output = self.model(self.diffusion.noised(x, t, noise), t)
        losses = self.diffusion.losses(output, x, t, noise, self.config.objective)
        self.sampler.update_with_local_losses(t, losses.detach())
        self.optimizer.zero_grad()
        output.retain_grad()
        (losses * weights).mean().backward()
        self.optimizer.step()
        self.schedule.step()
        assert output.grad is not None
        return t, losses.detach(), output.grad * (size / weights).view(-1, 1, 1, 1)

    @torch.no_grad()
    def test_losses(self) -> dict[str, float]:
        """Of every objective, over all timesteps, with images and noise that are the same for all
        runs."""
        generator, test = torch.Generator().manual_seed(0), self.images.test
        totals = dict.fromkeys(OBJECTIVES, 0.0)
        for t in torch.arange(self.config.num_timesteps).split(250):
            t = t.repeat(TEST_IMAGES_A_STEP)
            x = test[torch.randint(len(test), t.shape, generator=generator)]
            noise = torch.randn(x.shape, generator=generator)
            output = self.model(self.diffusion.noised(x, t, noise), t)
            for name in OBJECTIVES:
                totals[name] += float(self.diffusion.losses(output, x, t, noise, name).sum())
        number = self.config.num_timesteps * TEST_IMAGES_A_STEP
        return {name: total / number for name, total in totals.items()}


def measure(config: Config, images: Images) -> Row:
    """The row of one training run."""
    run = Run(config, images)
    begin = time.process_time()
    for _ in tqdm(range(config.steps), desc=config.method, leave=False, disable=None):
        run.step()
    seconds = time.process_time() - begin
    return {
        "benchmark": "timesteps",
        "config": asdict(config),
        "seconds": seconds,
        "test": run.test_losses(),
        **provenance(torch.device("cpu")),
    }


def costs(setting: Config, images: Images, rounds: int) -> Row:
    """The row of a step's cost with every sampler, all of them past their warm-up."""
    runs = {method: Run(replace(setting, method=method), images) for method in METHODS}
    every = torch.arange(setting.num_timesteps)
    for run in runs.values():
        for _ in range(10):
            run.sampler.update_with_local_losses(every, torch.ones(len(every)))
        for _ in range(2 * len(every) // setting.batch_size + 1):
            run.sampler.sample(setting.batch_size, "cpu")
    cases = {method: run.step for method, run in runs.items()}
    times = interleaved(cases, rounds=rounds, calls=10, clock=thread)
    return {
        "benchmark": "timesteps_cost",
        "config": asdict(setting),
        "ms": {method: times.us(method) / 1e3 for method in METHODS},
        "ratio": {method: times.ratio(method, "uniform")._asdict() for method in METHODS},
        **provenance(torch.device("cpu")),
    }


# ---- variance of the gradient, on one network for all samplers


def norms_of(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """float64 ``[T, K]`` of K images a timestep: squared norms of the gradient of all parameters,
    of the loss, and of the gradient at the output."""
    diffusion, objective = run.diffusion, run.config.objective
    generator, train = torch.Generator().manual_seed(1), run.images.train
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}
    steps = run.config.num_timesteps

    def loss(parameters: Any, shift: Tensor, x: Tensor, t: Tensor, noise: Tensor) -> Any:
        x, t, noise = x[None], t[None], noise[None]
        noisy = diffusion.noised(x, t, noise)
        output = functional_call(run.model, parameters, (noisy, t)) + shift
        value = diffusion.losses(output, x, t, noise, objective)[0]
        return value, value

    def squares(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        shift = torch.zeros(2 * x.shape[0], *x.shape[1:])
        found, value = grad(loss, (0, 1), has_aux=True)(parameters, shift, x, t, noise)
        of_all = torch.stack([g.square().sum() for g in found[0].values()]).sum()
        return torch.stack([of_all, value.square(), found[1].square().sum()])

    rows = []
    for t in torch.arange(steps).split(5):
        t = t.repeat_interleave(IMAGES_A_STEP)
        x = train[torch.randint(len(train), t.shape, generator=generator)]
        rows.append(vmap(squares)(x, t, torch.randn(x.shape, generator=generator)))
    of_all, losses, outputs = torch.cat(rows).double().view(steps, IMAGES_A_STEP, 3).unbind(2)
    return of_all, losses, outputs


def gains(squares: Tensor, chosen_by: Tensor) -> float:
    """N_ems / B of p ~ sqrt(E[chosen_by]), which half of the images give and the others judge;
    the mean gradient counts as 0."""
    half, traces = squares.shape[1] // 2, 0.0
    for mine, others in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        p = chosen_by[:, mine].mean(1).sqrt()
        norms = squares[:, others].mean(1).sqrt()
        traces += float(population_traces(norms, p / p.sum()).trace_is) / 2
    return float(squares.mean()) / traces


def gain_of(squares: Tensor, weights: Any) -> float:
    """N_ems / B of a sampler's probabilities."""
    p = torch.as_tensor(weights, dtype=torch.float64)
    norms = squares.mean(1).sqrt()
    return float(population_traces(norms, p / p.sum()).effective_batch_size)


def probe(config: Config, images: Images, at: list[int]) -> Row:
    """The row of one network: N_ems / B of every way to draw timesteps, at some steps."""
    run = Run(config, images)
    steps, seed = config.num_timesteps, config.seed
    # They would pause for lack of gain, which they can't tell from draws of another sampler.
    method = EMAIS(floor=FLOOR, least_gain=0.0)
    lookers = {
        "loss-second-moment": LossSecondMoment(steps, seed),
        "fastis by loss": TimestepSampler(steps, method=method, seed=seed),
        "fastis by gradient": TimestepSampler(steps, method=method, seed=seed),
    }
    found: dict[str, list[float]] = {}
    for step in tqdm(range(1, max(at) + 1), desc=config.method, leave=False, disable=None):
        t, losses, gradients = run.step()
        norms = gradients.flatten(1).norm(dim=1)
        for name, looker in lookers.items():
            looker.sample(config.batch_size, "cpu")  # its own warm-up goes on
            looker.update_with_local_losses(t, norms if "gradient" in name else losses)
        if step in at:
            of_all, of_loss, of_output = norms_of(run)
            values = {
                "ideal": gains(of_all, of_all),
                "ideal, image and timestep": float(of_all.mean() / of_all.sqrt().mean().square()),
                "by loss": gains(of_all, of_loss),
                "by gradient at the output": gains(of_all, of_output),
                **{name: gain_of(of_all, looker.weights()) for name, looker in lookers.items()},
            }
            for name, value in values.items():
                found.setdefault(name, []).append(float(f"{value:.4g}"))
    return {
        "benchmark": "timesteps_probe",
        "config": asdict(config),
        "steps": at,
        "gain": found,
        **provenance(torch.device("cpu")),
    }


# ---- which runs


def planned(setting: Config, rows: list[Row], methods: list[str], parts: list[float]) -> Any:
    """The runs that are still to be made, one after the other: first the rates, by seed 0; then
    the best one of every method with all seeds and shorter schedules."""

    def loss(config: Config) -> float | None:
        done = [r for r in rows if r["benchmark"] == "timesteps" and r["config"] == asdict(config)]
        return done[-1]["test"][config.objective] if done else None

    def missing(config: Config) -> Any:
        if loss(config) is None:
            yield config

    for lr in RATES:
        for method in methods:
            yield from missing(replace(setting, method=method, lr=lr, seed=0))
    best = {m: best_rate(rows, replace(setting, method=m)) for m in methods}
    for part in sorted(parts, reverse=True):
        for seed in range(SEEDS):
            for method in methods:
                steps = round(part * setting.steps)
                yield from missing(
                    replace(setting, method=method, lr=best[method], seed=seed, steps=steps)
                )


def best_rate(rows: list[Row], setting: Config) -> float:
    """Of the grid, by the test loss of seed 0 at full length."""
    found = {
        row["config"]["lr"]: row["test"][setting.objective]
        for row in rows
        if row["benchmark"] == "timesteps"
        and row["config"] == asdict(replace(setting, lr=row["config"]["lr"], seed=0))
        and row["config"]["lr"] in RATES
    }
    return min(found, key=found.__getitem__)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a run")
    add = parser.add_argument
    add("command", choices=["probe", "compare", "costs"])
    add("--dataset", default="fashion_mnist")
    add("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    add("--objective", choices=OBJECTIVES, default="vlb")
    add("--schedule", choices=list(SCHEDULES), default="linear")
    add("--num-timesteps", type=int, default=1000)
    add("--batch-size", type=int, default=32)
    add("--steps", type=int, default=2000, help="of the longest runs")
    add("--parts", type=float, nargs="+", default=[1.0], help="of --steps, for other lengths")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--at", type=int, nargs="+", default=[250, 1000, 2000], help="of the probe")
    add("--lr", type=float, default=2e-3, help="of the probe")
    add("--rounds", type=int, default=30, help="of the costs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    images = load_images(args.dataset, args.data)
    options = ("objective", "schedule", "num_timesteps", "batch_size", "dataset")
    given = {name: vars(args)[name] for name in options}
    setting = Config("uniform", args.lr, 0, args.steps, data=data_name(args.data), **given)
    if args.command != "compare":
        if args.command == "probe":
            row = probe(replace(setting, steps=max(args.at)), images, args.at)
        else:
            row = costs(setting, images, args.rounds)
        print(row.get("gain") or row["ratio"])
        if args.json:
            append_row(args.json, row)
        return 0
    rows = read_rows(args.json) if args.json else []
    for config in planned(setting, rows, list(args.methods), args.parts):
        rows.append(measure(config, images))
        print(
            config,
            f"{rows[-1]['test'][config.objective]:.4f} {rows[-1]['seconds']:.1f} s",
            flush=True,
        )
        if args.json:
            append_row(args.json, rows[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
