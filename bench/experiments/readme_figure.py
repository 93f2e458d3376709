"""The README's figure: train loss against seconds, EMAIS and uniform sampling at their best rates.

Reads the rows of the experiment ``wall_clock`` and nothing else; to measure them anew:

    python bench/experiments/reproduce.py wall_clock --data fashion_mnist.npz --jobs 2 --again
    python bench/experiments/readme_figure.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.experiments.groups import Group, Results, best_rates
from bench.experiments.papers import EXPERIMENTS
from bench.experiments.plot import STYLE, draw_curve, log_axis, plt, save
from bench.experiments.reproduce import RESULTS, read_all
from bench.report import make_parser

EXPERIMENT = "wall_clock"
# The variants that are drawn: in what colour, under what name.
LINES = {
    "scan": ("#0072B2", "uniform (SGD-Scan)"),
    "emais": ("#D55E00", "EMAIS.published()"),
    "emais (floor 0.1, tau_scale 0.25)": ("#CC79A7", "EMAIS, linear rule"),
}


def draw(groups: list[Group], out: Path) -> None:
    with plt.rc_context({**STYLE, "lines.linewidth": 1.6}):
        figure, axes = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
        best = best_rates(groups)
        for variant, (colour, label) in LINES.items():
            group = best[variant]
            label = f"{label}, base rate {group.config.lr:g}"
            if draw_curve(axes, group, "train_loss", "seconds", colour, label) is None:
                raise ValueError(f"{label}: the rows have no seconds; run {EXPERIMENT} again")
        axes.set_title("train loss, LeNet-5 on Fashion-MNIST")
        axes.set_xlabel("training time, s (one thread of an AMD EPYC, Zen 4)")
        axes.set_ylim(0.11, 0.6)
        axes.set_xlim(left=0)
        log_axis(axes)
        axes.legend(frameon=False)
        save(figure, out)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "readme.png")
    args = parser.parse_args(argv)
    experiment = Results(EXPERIMENT, EXPERIMENTS[EXPERIMENT], read_all(args.results))
    draw(experiment.main_groups, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
