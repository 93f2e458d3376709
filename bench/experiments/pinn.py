"""Collocation points of physics-informed networks: fastis and what is used there, at equal time.

    python bench/experiments/pinn.py --costs --probe --compare --json bench/results/pinn.jsonl
    python bench/experiments/pinn.py --report bench/results

Networks of four layers of 32 learn Burgers' equation and Allen-Cahn's by the mean square of the
residual (equations.py). What differs is who chooses the points of a step (collocation.py), and the
score that fastis learns from, of each point's own loss r^2, all but "norm" from the forward pass::

    norm      |d r^2 / d theta|, all parameters, exactly (jets.py)
    last      |d r^2 / d theta| of the last layer alone
    output    |d r^2 / d (N, N_t, N_x, N_xx)|
    residual  |r|          loss  r^2

--costs measures the processor time of a step of each contender, in turns; --compare then gives each
as many steps as fit the time of ``--steps`` steps on fixed points, and lets the cosine schedule end
there. All have the same grid of learning rates, and the best one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import fastis
from bench.experiments.collocation import Fresh, Resampled, Sampled, uniform_points
from bench.experiments.equations import EQUATIONS, Form
from bench.experiments.jets import JetMLP, Tape, squared_norms
from bench.report import Report, Row, make_parser, read_rows
from bench.timing import interleaved, thread
from fastis.estimators import population_traces

GRID = (101, 257)  # of t and x, for the error
SCORES = ("norm", "last", "output", "residual", "loss")
RATES = {"burgers": (1e-3, 3e-3, 1e-2), "allen_cahn": (3e-3, 1e-2, 2e-2)}
STEPS = 5000
MIXED_IN = 0.1  # of uniform, in the probe
COSTS, PROBE, RUN = "pinn_costs", "pinn_probe", "pinn"


@dataclass(frozen=True)
class Contender:
    """A way to choose points: a class of collocation.py ("emais": Sampled), and its options."""

    way: str
    options: Mapping[str, Any] = field(default_factory=dict)
    score: str = ""
    max_factor: float = 0.0  # of the learning rate, which then follows N_ems; 0: it doesn't


def _fastis(score: str, max_factor: float = 0.0, **options: Any) -> Contender:
    return Contender("emais", options, score, max_factor)


_ALWAYS = {"least_gain": 0.0}
_REFRESHED = {**_ALWAYS, "refresh_every": 200, "tau": 200.0}
INCUMBENTS = {
    "fixed points": Contender("scan"),
    "new points": Contender("fresh"),
    "RAD, k = 1": Contender("rad", {"power": 1.0, "constant": 1.0, "every": 500}),
    "RAD, k = 2": Contender("rad", {"power": 2.0, "constant": 1.0, "every": 500}),
    "rescored, nearest of 1,000": Contender(
        "rescored", {"power": 2.0, "constant": 0.1, "every": 1000, "seeds": 1000}
    ),
    "rescored, all points": Contender("rescored", {"power": 2.0, "constant": 0.1, "every": 1000}),
}
OURS = {
    "defaults, last": _fastis("last"),
    "refreshed, last": _fastis("last", **_REFRESHED),
    "refreshed, residual, correction 0": _fastis("residual", **_REFRESHED, correction=0.0),
    "no pauses, last": _fastis("last", **_ALWAYS),
    "no pauses, loss": _fastis("loss", **_ALWAYS),
    "refreshed, loss": _fastis("loss", **_REFRESHED),
    "refreshed, last, rate": _fastis("last", 2.0, **_REFRESHED),
    "refreshed, last, correction 0": _fastis("last", **_REFRESHED, correction=0.0),
    "no pauses, residual": _fastis("residual", **_ALWAYS),
    "no pauses, norm": _fastis("norm", **_ALWAYS),
}
CONTENDERS = {**INCUMBENTS, **OURS}


@dataclass(frozen=True)
class PinnConfig:
    """A run; ``contender`` names one of ``CONTENDERS``."""

    equation: str
    contender: str
    lr: float
    steps: int
    seed: int = 0
    batch_size: int = 128
    points: int = 10_000
    width: int = 32
    # The first layer's weights start that much larger: solutions with fronts are then found sooner.
    scale: float = 3.0


@cache
def truth(name: str) -> tuple[Form, Tensor]:
    """The form on the grid of the error, and the solution there, ``[T, X]``."""
    equation = EQUATIONS[name]
    t, x = (
        torch.linspace(low, 1, n, dtype=torch.float64) for low, n in zip((0, -1), GRID, strict=True)
    )
    points = torch.meshgrid(t, x, indexing="ij")
    return equation.form(*(part.flatten() for part in points)), equation.solution(t, x)


class Run:
    """A network in training."""

    def __init__(self, config: PinnConfig) -> None:
        self.config, self.equation = config, EQUATIONS[config.equation]
        self.contender = CONTENDERS[config.contender]
        torch.manual_seed(config.seed)
        self.model = JetMLP([2, *[config.width] * 4, 1], config.scale)
        self.optimizer = torch.optim.Adam([self.model.theta], lr=config.lr, fused=True)
        generator = torch.Generator().manual_seed(1000 + config.seed)
        t, x = uniform_points(config.points, generator)
        self.pool = self.equation.form(t, x)
        self.points = self._way(torch.stack([t, x], 1).float(), generator)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)
        self.schedule: Any = schedule
        if self.contender.max_factor:
            self.schedule = fastis.EffectiveBatchLR(
                schedule, self.points.sampler, max_factor=self.contender.max_factor
            )

    def _way(self, coordinates: Tensor, generator: torch.Generator) -> Any:
        way, size, seed = self.contender.way, self.config.batch_size, self.config.seed
        options = dict(self.contender.options)
        if way == "fresh":
            return Fresh(self.equation, size, generator, **options)
        if way in ("rad", "rescored"):
            options["corrected"] = way == "rescored"
            return Resampled(self.pool, coordinates, size, generator, self.residuals, **options)
        if way == "scan":
            return Sampled(self.pool, size, seed, method="scan")
        correction = options.pop("correction", 1.0)
        if "refresh_every" in options:
            options["score_fn"] = self.scores
        method = fastis.methods.EMAIS(**options)
        return Sampled(self.pool, size, seed, method=method, correction=correction)

    def residuals(self, form: Form) -> Tensor:
        """``[n]``."""
        return torch.cat([self.forward(part)[0] for part in parts_of(form)])

    def scores(self, indices: Tensor) -> Tensor:
        """``[n]``, of points of the pool."""
        parts = parts_of(self.pool.at(indices))
        return torch.cat([cheap(self.contender.score, *self.forward(part)) for part in parts])

    def forward(self, form: Form) -> tuple[Tensor, Tensor, list[Tape]]:
        """Residuals ``[B]``, their derivatives by the output of the network ``[4, B]``, tapes."""
        n, tapes = self.model.forward(form.inputs)
        r, by_u = self.equation.residual(form.jets(n))
        return r, form.slopes(by_u), tapes

    def step(self) -> None:
        points, score = self.points.next(), self.contender.score
        r, slopes, tapes = self.forward(points.form)
        delta = r if points.weights is None else points.weights * r
        norms = self.model.backward(tapes, (2 / len(r)) * delta * slopes, score == "norm")
        if norms is not None:
            self.points.learn(points, norms * len(r) / points.weights)
        elif score:
            self.points.learn(points, cheap(score, r, slopes, tapes))
        self.optimizer.step()
        self.schedule.step()

    def error(self) -> float:
        """Relative L2 error on the grid."""
        form, solution = truth(self.config.equation)
        n = torch.cat([self.model.forward(part.inputs)[0][0] for part in parts_of(form)])
        u = (form.start[0] + form.factor[0] * n).double().view(GRID)
        return float((u - solution).norm() / solution.norm())


def parts_of(form: Form, size: int = 512) -> list[Form]:
    """Small enough for the caches."""
    return [Form(*part) for part in zip(*(f.split(size, dim=1) for f in form), strict=True)]


def cheap(score: str, r: Tensor, slopes: Tensor, tapes: list[Tape]) -> Tensor:
    """``[B]``: a score of each point's own loss from the forward pass."""
    if score == "residual":
        return r.abs()
    if score == "loss":
        return r * r
    if score == "output":
        return 2 * r.abs() * torch.linalg.vector_norm(slopes, dim=0)
    if score == "last":
        return 2 * r.abs() * squared_norms(tapes[-1].h, slopes[..., None]).sqrt()
    raise ValueError(f"score must be one of {SCORES[1:]}, got {score!r}")


# ---- the probe


def population(run: Run) -> tuple[dict[str, Tensor], Tensor]:
    """Every score of all points of the pool, float64 ``[N]``, and the mean gradient."""
    found: dict[str, list[Tensor]] = {score: [] for score in SCORES}
    total = torch.zeros_like(run.model.theta, dtype=torch.float64)
    for part in parts_of(run.pool):
        r, slopes, tapes = run.forward(part)
        found["norm"].append(run.model.backward(tapes, 2 * r * slopes, norms=True))
        total += run.model.theta.grad
        for score in SCORES[1:]:
            found[score].append(cheap(score, r, slopes, tapes))
    scores = {score: torch.cat(parts).double() for score, parts in found.items()}
    return scores, total / run.config.points


def gains(run: Run) -> dict[str, float]:
    """N_ems / B, exactly, of the gradient by the parameters: under probabilities in proportion to
    each score, and under those in force ("in force", for a sampler's)."""
    scores, mean = population(run)
    ways = {s: (1 - MIXED_IN) * w / w.sum() + MIXED_IN / len(w) for s, w in scores.items()}
    if run.contender.way == "emais":
        ways["in force"] = run.points.sampler.probabilities()
    traces = {way: population_traces(scores["norm"], p, mean) for way, p in ways.items()}
    return {way: float(t.trace_uniform / t.trace_is) for way, t in traces.items()}


def probe(report: Report, steps: int, equations: Sequence[str]) -> None:
    report.lines = [("equation", "trained with", "step", "error", *SCORES, "in force")]
    for equation in equations:
        for label in ("fixed points", "no pauses, last", "refreshed, last", "refreshed, loss"):
            run = Run(PinnConfig(equation, label, RATES[equation][1], steps))
            for at in (steps // 8, steps // 4, steps // 2, steps):
                while run.schedule.last_epoch < at:
                    run.step()
                found, error = gains(run), run.error()
                about = {"config": asdict(run.config), "step": at, "error": error}
                report.store({"benchmark": PROBE, **about, "gain": found})
                cells = (f"{found[way]:.2f}" for way in (*SCORES, "in force") if way in found)
                report.line(*(equation, label, at, f"{error:.3f}"), *[*cells, "-"][:6])
    report.show()


# ---- the comparison at equal time


def costs(report: Report, rounds: int, calls: int, labels: Sequence[str]) -> dict[str, float]:
    """Microseconds of a step of each contender, in turns, with all that comes once in a while."""
    cases = {label: Run(PinnConfig("burgers", label, 1e-3, 10**6)).step for label in labels}
    times = interleaved(cases, rounds=rounds, calls=calls, clock=thread)
    us = {label: times.us(label) for label in cases}
    ratios = {label: times.ratio(label, "fixed points") for label in cases}
    report.lines = [("contender", "us a step", "x fixed points")]
    for label, ratio in ratios.items():
        report.line(label, f"{us[label]:.0f}", ratio.text(".2f"))
    spreads = {label: list(ratio) for label, ratio in ratios.items()}
    report.store({"benchmark": COSTS, "us": us, "ratio": spreads, "calls": calls})
    report.show()
    return us


def steps_of(label: str, row: Row, steps: int) -> int:
    """How many steps fit the time of ``steps`` on fixed points."""
    return round(steps / row["ratio"][label][1])


def key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(config.items()))


def wanted(
    budgets: Mapping[str, int], equation: str, seeds: int, rates: Sequence[float] | None = None
) -> Iterator[PinnConfig]:
    """All runs of one length, seed by seed; ``rates``: those alone, of the grid."""
    for seed in range(seeds):
        for label, steps in budgets.items():
            for rate in rates or RATES[equation]:
                yield PinnConfig(equation, label, rate, steps, seed)


def train(config: PinnConfig) -> Row:
    """The row of a run: its error at each tenth, and at the end."""
    run, curve = Run(config), []
    for tenth in range(1, 11):
        while run.schedule.last_epoch < tenth * config.steps // 10:
            run.step()
        curve.append(float(f"{run.error():.5g}"))
    return {"config": asdict(config), "error": curve[-1], "curve": curve}


def compare(report: Report, args: Any) -> None:
    rows = read_rows(args.json) if args.json else []
    measured = [row for row in rows if row["benchmark"] == COSTS]
    if not measured:
        raise SystemExit("no row of costs in --json: run --costs first")
    there = {key(row["config"]) for row in rows if row["benchmark"] == RUN}
    report.lines = [("equation", "contender", "lr", "steps", "seed", "error")]
    for equation in args.equations:
        budgets = {label: steps_of(label, measured[-1], args.steps) for label in args.only}
        for config in wanted(budgets, equation, args.seeds, args.rates):
            if key(asdict(config)) in there:
                continue
            row = {"base_steps": args.steps, **train(config)}
            report.store(row)
            report.line(
                equation, config.contender, config.lr, config.steps, config.seed, row["error"]
            )
            print(*report.lines[-1], flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    add = parser.add_argument
    for name in ("costs", "probe", "compare"):
        add(f"--{name}", action="store_true")
    add("--equations", nargs="+", choices=EQUATIONS, default=list(EQUATIONS))
    add("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    add("--rates", type=float, nargs="+", help="learning rates (default: the whole grid)")
    add("--steps", type=int, default=STEPS, help="of fixed points; the others' time is the same")
    add("--seeds", type=int, default=3)
    add("--rounds", type=int, default=5, help="of --costs")
    add("--calls", type=int, default=1000, help="of a contender in a round of --costs")
    add("--report", type=Path, help="folder to write the page into, from its rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = Report(RUN, (), args.json)
    if args.costs:
        costs(report, args.rounds, args.calls, args.only)
    if args.probe:
        probe(report, args.steps, args.equations)
    if args.compare:
        compare(report, args)
    if args.report:
        from bench.experiments import pinn_page

        print(pinn_page.write(args.report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
