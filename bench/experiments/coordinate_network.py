"""A SIREN fitted to an image: which pixels make the minibatch?

    python bench/experiments/coordinate_network.py [--seeds 3]
    python bench/experiments/coordinate_network.py --report

Network, images and the order of the pixels are those of examples/coordinate_network.py; "photo" is
the portrait that comes with matplotlib. Adam, its rate a cosine to 0 at the end of each run. Parts:

- the probe: along a run with fastis, the factor by which probabilities divide the variance of a
  minibatch's gradient (N_ems/B), from the exact gradients of single pixels with respect to all
  parameters, on a fixed random quarter of the pixels;
- the times of a step, all ways in turn, on the clock of one thread;
- the comparison: every way with as many steps as fit the processor time of STEPS steps with uniform
  pixels, its own costs included; each at its rate of greatest PSNR of seed 0 among RATES. fastis
  with shorter times as well, at the same rate: how soon is it as good?
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import fastis
from bench import timing
from bench.experiments.missing_runs import row_of, run_missing
from bench.report import Row, make_parser, positive, read_rows
from examples.coordinate_network import photo, pixels, psnr, siren, texture
from fastis.estimators import gradient_norms, population_traces

ROWS = Path(__file__).parents[1] / "results" / "coordinate_network.jsonl"
BENCHMARK = "coordinate_network"
SIZE, WIDTH, BATCH, STEPS = 256, 64, 2048, 1000
RATES = (0.0005, 0.001, 0.002, 0.004)
BUDGETS = (0.5, 0.7)  # of the time, for fastis
PROBED = (100, 250, 500, 1000)
MIXED = 0.1  # of uniform draws in what is proportional to last errors


@dataclass(frozen=True)
class Fit:
    """A run of the comparison."""

    image: str
    way: str
    lr: float
    budget: float
    seed: int


@dataclass(frozen=True)
class Probe:
    image: str
    lr: float = 0.002
    steps: int = STEPS


@dataclass(frozen=True)
class StepTimes:
    rounds: int = 20


@cache
def data(image: str) -> tuple[Tensor, Tensor]:
    if image == "texture":
        return pixels(texture(SIZE))
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return pixels(photo(file, SIZE))


IMAGES = ("texture", "photo")


# ---- ways to choose the pixels


class Way(Protocol):
    def indices(self, progress: float) -> Tensor:
        """int64 [B]: the next minibatch; ``progress`` of the run in [0, 1)."""

    def loss(self, prediction: Tensor, target: Tensor) -> Any:
        """Of that minibatch; has ``.backward()``."""


class Shuffled:
    """Uniform pixels: whole epochs in random order."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.left = num_samples, iter(())

    def indices(self, progress: float) -> Tensor:
        found = next(self.left, None)
        if found is None or len(found) < BATCH:
            self.left = iter(torch.randperm(self.n, generator=self.generator).split(BATCH))
            return next(self.left)
        return found

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)


class LastError(Shuffled):
    """p ~ the pixels' last loss^power and a tenth uniform, weights (1/(N p))^correction.

    Power 1: in proportion to the loss. Power 0.5 with correction 0.6: as soft mining (Kheradmand et
    al. 2023) draws and weighs, from a table in place of its Langevin steps. The first epoch is
    uniform.
    """

    def __init__(self, num_samples: int, seed: int, power: float, correction: float) -> None:
        super().__init__(num_samples, seed)
        self.power, self.correction = power, correction
        self.table = torch.zeros(num_samples)
        self.warm_up = num_samples // BATCH

    def indices(self, progress: float) -> Tensor:
        if self.warm_up:
            self.warm_up -= 1
            self.drawn, self.weights = super().indices(progress), torch.ones(BATCH)
        else:
            p = self.table * ((1 - MIXED) / self.table.sum()) + MIXED / self.n
            self.drawn = torch.multinomial(p, BATCH, replacement=True, generator=self.generator)
            self.weights = (self.n * p[self.drawn]).pow_(-self.correction)
        return self.drawn

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        losses = F.mse_loss(prediction, target, reduction="none").mean(1)
        self.table[self.drawn] = losses.detach() ** self.power
        return (self.weights * losses).mean()


class Fastis:
    """fastis.Sampler on |residual|; the correction goes linearly from ``start`` to 1."""

    def __init__(self, num_samples: int, seed: int, start: float, scheme: str) -> None:
        method = fastis.methods.EMAIS(warmup_epochs=1, least_gain=0.0)
        self.sampler = fastis.Sampler(num_samples, BATCH, method=method, scheme=scheme, seed=seed)
        self.start = start

    def indices(self, progress: float) -> Tensor:
        if self.start < 1:
            self.sampler.correction = self.start + (1 - self.start) * progress
        self.batch = self.sampler.sample()
        return self.batch.indices

    def loss(self, prediction: Tensor, target: Tensor) -> fastis.ScoredLoss:
        out = fastis.mse_loss(prediction, target, self.batch.weights)
        self.sampler.update(self.batch, out)
        return out


INCUMBENTS: dict[str, Callable[[int, int], Way]] = {
    "uniform": Shuffled,
    "loss, uncorrected": lambda n, seed: LastError(n, seed, 1.0, 0.0),
    "loss, corrected": lambda n, seed: LastError(n, seed, 1.0, 1.0),
    "soft mining": lambda n, seed: LastError(n, seed, 0.5, 0.6),
}
OURS: dict[str, Callable[[int, int], Way]] = {
    "fastis": lambda n, seed: Fastis(n, seed, 1.0, "multinomial"),
    "fastis, annealed": lambda n, seed: Fastis(n, seed, 0.0, "multinomial"),
    "fastis, annealed, stratified": lambda n, seed: Fastis(n, seed, 0.0, "stratified"),
}
WAYS = INCUMBENTS | OURS


class Fitting:
    """A network, its optimizer and schedule, and who chooses the pixels."""

    def __init__(self, image: str, way: str, lr: float, steps: int, seed: int) -> None:
        self.x, self.y = data(image)
        torch.manual_seed(seed)
        self.model, self.steps, self.done = siren(self.y.shape[1], WIDTH), steps, 0
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.way = WAYS[way](len(self.x), seed)

    def step(self) -> None:
        indices = self.way.indices(min(self.done / self.steps, 1.0))
        loss = self.way.loss(self.model(self.x[indices]), self.y[indices])
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.done += 1


# ---- the three kinds of rows


def measure_step_times(config: StepTimes) -> dict[str, Any]:
    """Milliseconds a step, and relative to uniform pixels in the same round."""
    fits = {way: Fitting("photo", way, 0.001, 10_000, 0) for way in WAYS}
    for fit in fits.values():
        for _ in range(2 * len(fit.x) // BATCH):  # past the uniform epochs
            fit.step()
    cases = {way: fit.step for way, fit in fits.items()}
    times = timing.interleaved(cases, rounds=config.rounds, calls=5, clock=timing.thread)
    ratios = {way: times.ratio(way, "uniform") for way in WAYS}
    return {
        "ms": {way: round(times.us(way) / 1e3, 4) for way in WAYS},
        "ratio": {way: round(ratio.median, 4) for way, ratio in ratios.items()},
        "quartiles": {way: [round(q, 4) for q in r.quartiles] for way, r in ratios.items()},
    }


def measure_probe(config: Probe) -> dict[str, Any]:
    """N_ems / B of probabilities in proportion to several scores, and of the sampler's own."""
    fit = Fitting(config.image, "fastis", config.lr, config.steps, 0)
    n = len(fit.x)
    some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // 4]
    found: dict[str, list[float]] = {"step": [], "psnr": []}
    for step in PROBED:
        while fit.done < step:
            fit.step()
        F.mse_loss(fit.model(fit.x), fit.y).backward()
        mean_grad = torch.cat([p.grad.flatten() for p in fit.model.parameters()])
        fit.optimizer.zero_grad()
        norms = gradient_norms(fit.model, F.mse_loss, fit.x[some], fit.y[some])
        with torch.no_grad():
            residuals = (fit.model(fit.x) - fit.y).norm(dim=1).double()[some]
        scores = {
            "gradient norm": norms.double(),
            "|residual|": residuals,
            "loss": residuals.square() + MIXED / (1 - MIXED) * residuals.square().mean(),
            "fastis": fit.way.sampler.probabilities()[some],
        }
        found["step"].append(step)
        found["psnr"].append(round(psnr(fit.model, fit.x, fit.y), 2))
        for name, score in scores.items():
            traces = population_traces(norms, score / score.sum(), mean_grad)
            factor = float(traces.trace_uniform / traces.trace_is)
            found.setdefault(name, []).append(round(factor, 3))
    return found


def steps_within(budget: float, way: str, times: Row) -> int:
    return round(budget * STEPS / times["final"]["ratio"][way])


def measure_fit(config: Fit, times: Row) -> dict[str, Any]:
    steps = steps_within(config.budget, config.way, times)
    fit = Fitting(config.image, config.way, config.lr, steps, config.seed)
    seconds = timing.thread(fit.step, steps)
    found = psnr(fit.model, fit.x, fit.y)
    found = round(found, 3) if math.isfinite(found) else None
    return {"psnr": found, "steps": steps, "seconds": round(seconds, 2)}


# ---- which runs


def best_rate(rows: list[Row], image: str, way: str) -> float | None:
    """Of greatest PSNR of seed 0; None until all are there."""
    found = {lr: row_of(rows, Fit(image, way, lr, 1.0, 0)) for lr in RATES}
    if None in found.values():
        return None
    return max(RATES, key=lambda lr: found[lr]["final"]["psnr"] or -math.inf)


def fits(path: Path, seeds: int) -> Iterator[Fit]:
    """Every way's grid, the chosen rates' other seeds, then fastis' shorter times."""
    for image in IMAGES:
        for way in WAYS:
            yield from (Fit(image, way, lr, 1.0, 0) for lr in RATES)
    rows = read_rows(path)
    best = {(image, way): best_rate(rows, image, way) for image in IMAGES for way in WAYS}
    for seed in range(1, seeds):
        yield from (Fit(image, way, lr, 1.0, seed) for (image, way), lr in best.items())
    for seed in range(seeds):
        for budget in BUDGETS:
            for (image, way), lr in best.items():
                if way in OURS and way != "fastis":
                    yield Fit(image, way, lr, budget, seed)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=positive(int), default=3, help="how many: 0, 1, ...")
    add("--json", type=Path, default=ROWS, help="file of the rows")
    add("--report", action="store_true", help="no runs: write the page from the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.report:
        from bench.experiments import coordinate_network_page

        print(coordinate_network_page.write(args.json.parent))
        return 0
    path = args.json
    (times,) = run_missing(f"{BENCHMARK}_step_times", path, [StepTimes()], measure_step_times)
    run_missing(f"{BENCHMARK}_probe", path, map(Probe, IMAGES), measure_probe)
    run_missing(BENCHMARK, path, fits(path, args.seeds), lambda c: measure_fit(c, times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
