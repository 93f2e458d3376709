"""Table and picture of a results file of the main job; reads rows only.

    python bench/experiments/show.py runs/results.jsonl [--compared-with scan:0.1] [--out PNG]

Differences are paired by seed, since runs of equal seeds start from the same network; ± after one
is Student's 95 % interval. Where a method has several learning rates, the picture and the last
lines are about its best one, that of least final train loss (the mean over seeds).
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.experiments.config import RunConfig
from bench.experiments.groups import Group, best_rates, groups_of
from bench.experiments.tables import mean_sd, results_table, time_to_loss
from bench.report import Row, make_parser, read_rows

FINALS = (("train loss", "train_loss", 4), ("test error, %", "test_error", 2))
PANELS = ("train_loss", "test_error", "effective_batch_size")


def setting_of(config: RunConfig) -> RunConfig:
    """What a variant, learning rate and seed are compared within."""
    neutral = {"options": {}, "lr_rule": "", "scheme": "", "max_lr": 0.0, "score": ""}
    return replace(config, method="", lr=0.0, seed=0, **neutral)


def picture_name(config: RunConfig) -> str:
    parts = (config.dataset, config.model, config.optimizer, config.iterations, config.batch_size)
    return "-".join(map(str, parts)) + ".png"


def in_order(groups: Sequence[Group]) -> list[Group]:
    """Variants as they appeared, each with ascending rates."""
    labels = [group.label for group in groups]
    return sorted(groups, key=lambda group: (labels.index(group.label), group.config.lr))


def heading(groups: Sequence[Group]) -> str:
    c, seeds = groups[0].config, max(len(group.rows) for group in groups)
    return (
        f"{c.model} on {c.dataset} ({c.data}), {c.optimizer}, {c.iterations} iterations of "
        f"{c.batch_size}\n{seeds} seed(s): mean and standard deviation\n"
    )


def summary(groups: Iterable[Group]) -> str:
    """EMAIS against the best of the others, each at its best rate of those that were run."""
    best = best_rates(groups)
    emais = best.pop("emais (default)", None) or best.pop("emais", None)
    if emais is None or not best:
        return ""
    other = min(best.values(), key=lambda group: group.final_loss)
    lines = [f"Each at its best rate here: emais {emais.config.lr:g}"]
    lines[0] += f", {other.label} {other.config.lr:g} (best of the others)."
    for title, name, digits in FINALS:
        ours, theirs = (mean_sd(group.finals(name), digits) for group in (emais, other))
        lines.append(f"{title}: {ours} against {theirs}")
    if other.final_loss > 0 and math.isfinite(emais.final_loss):
        lines[1] += f", {100 * (emais.final_loss / other.final_loss - 1):+.0f} %"
    return "\n".join(lines)


def reference_of(groups: Sequence[Group], compared_with: str) -> Group:
    """The runs named METHOD or METHOD:LR, at their best rate; unnamed SGD-Scan's, or the first's.

    Raises
    ------
    ValueError
        where there are no such runs.
    """
    label, _, lr = (compared_with or "scan").partition(":")
    found = [g for g in groups if g.label == label and lr in ("", f"{g.config.lr:g}")]
    if not found and compared_with:
        names = ", ".join(f"{g.label}:{g.config.lr:g}" for g in groups)
        raise ValueError(f"--compared-with must be one of {names}, got {compared_with}")
    return next(iter(best_rates(found or groups).values()))


def show(rows: Iterable[Row], out: Path | None, compared_with: str = "") -> None:
    """Prints the tables of one setting's rows and draws them into ``out``."""
    groups = in_order(groups_of(rows))
    best, reference = list(best_rates(groups).values()), reference_of(groups, compared_with)
    print(results_table(groups, reference, brief=True))
    if math.isfinite(reference.final_loss):
        words, table = time_to_loss(best, reference, aligned=True).split("\n\n")
        print(f"\n{textwrap.fill(words, 100)}\n\n{table}")
    print("\n" + summary(groups))
    if out is not None:
        from bench.experiments import plot  # matplotlib: for this alone

        timed = all("seconds" in row["curves"] for group in best for row in group.rows)
        plot.draw(best, PANELS, "seconds" if timed else "step", out, heading(best))
        print(f"\ncurves: {out}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("file", type=Path, help="results.jsonl of train.py")
    parser.add_argument("--compared-with", default="", metavar="METHOD[:LR]", help="default: scan")
    parser.add_argument("--out", type=Path, help="the PNG (default: none)")
    args = parser.parse_args(argv)
    rows = read_rows(args.file)
    if not rows:
        parser.error(f"file must hold result rows, got none in {args.file}")
    setting = setting_of(RunConfig(**rows[-1]["config"]))
    shown = [row for row in rows if setting_of(RunConfig(**row["config"])) == setting]
    if len(shown) < len(rows):
        print(f"{args.file} holds several settings; shown is the last: {setting}", file=sys.stderr)
    try:
        show(shown, args.out, args.compared_with)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
