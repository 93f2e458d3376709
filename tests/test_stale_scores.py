"""Tables that follow another run's minibatches: probabilities, S by hand, rows and section."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_bench import fashion_file

import fastis

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import report
from bench.experiments import stale_scores
from bench.experiments.config import RunConfig
from bench.experiments.stale_scores import Follower, Rule

CONFIG = RunConfig("emais", 0.01, 0, model="mlp", batch_size=8, iterations=64, data="small.npz")


def scored(score: torch.Tensor) -> fastis.ScoredLoss:
    return fastis.ScoredLoss(score.mean(), score, score, None)


def shown(rule: Rule, minibatches: list[tuple[list[int], list[float]]], n: int = 4) -> Follower:
    """A follower that has seen these indices and scores, with coefficients of 1."""
    follower = Follower(rule, RunConfig("emais", 0.01, 0, batch_size=2), n, "cpu")
    for indices, scores in minibatches:
        batch = fastis.Batch(torch.tensor(indices), torch.ones(len(indices)))
        follower.update(batch, scored(torch.tensor(scores)))
    return follower


def test_efficiency_is_zero_for_optimal_and_one_for_uniform_draws():
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert stale_scores.efficiency(scores, scores / scores.sum()) == pytest.approx(0, abs=1e-12)
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert stale_scores.efficiency(scores, uniform) == pytest.approx(1)
    # mean(x^2 / (N p)) = (1 / 1.6 + 4 / 0.8 + 9 / 0.8 + 100 / 0.8) / 4 = 35.46875
    skewed = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    expected = (35.46875 - 16) / (28.5 - 16)
    assert stale_scores.efficiency(scores, skewed) == pytest.approx(expected)


def test_a_rule_of_the_methods_defaults_draws_as_the_run_does():
    sampler = fastis.Sampler(40, 8, seed=3)
    follower = Follower(Rule("same"), RunConfig("emais", 0.01, 3, batch_size=8), 40, "cpu")
    followed = stale_scores.Followed(sampler, [follower])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        followed.update(followed.sample(), scored(torch.rand(8, generator=generator)))
    assert torch.equal(follower.probabilities(), sampler.probabilities())
    assert followed.step == sampler.step == 30


def test_relative_scores_take_out_what_all_scores_do():
    """Scores that halve between two minibatches: the first one's samples weigh as the second's."""
    halving = [([0, 1], [1.0, 3.0]), ([2, 3], [0.5, 1.5])]
    plain = shown(Rule("plain"), halving).probabilities()
    assert plain.tolist() == pytest.approx([1 / 6, 1 / 2, 1 / 12, 1 / 4], rel=1e-4)
    relative = shown(Rule("relative", relative=True), halving).probabilities()
    keep = stale_scores.LEVEL_KEEP
    level = (keep * 2 + 1) / (keep + 1)  # the moving mean of 2, then 1
    w = torch.tensor([0.5, 1.5, 0.5 / level, 1.5 / level])
    assert relative.tolist() == pytest.approx((w / w.sum()).tolist(), rel=1e-4)


def test_age_pulls_to_the_mean_and_mix_adds_it():
    seen = [([0, 1], [1.0, 3.0]), ([2, 3], [1.0, 3.0])]
    p = torch.tensor([1, 3, 1, 3]) / 8
    fresh = torch.exp(torch.tensor([-2.0, -2.0, -1.0, -1.0]) / (0.5 * 2))
    aged = shown(Rule("aged", age=0.5), seen).probabilities()
    expected = fresh * p + (1 - fresh) / 4
    assert aged.tolist() == pytest.approx((expected / expected.sum()).tolist(), rel=1e-4)
    mixed = shown(Rule("mixed", mix=0.5), seen).probabilities()
    assert mixed.tolist() == pytest.approx(((p + 0.125) / 1.5).tolist(), rel=1e-4)


def test_a_run_gives_a_row_with_every_rule(tmp_path, capsys):
    threads = torch.get_num_threads()
    data, out = fashion_file(tmp_path / "small.npz"), tmp_path / "rows.jsonl"
    sizes = ["--iterations", "64", "--batch-size", "8"]
    assert stale_scores.main(["--data", str(data), "--lr", "0.01", "--json", str(out), *sizes]) == 0
    torch.set_num_threads(threads)
    (row,) = report.read_rows(out)
    assert row["steps"] == list(range(12, 65, 4))  # beyond two epochs of 5 minibatches
    assert list(row["efficiency"]) == [rule.name for rule in stale_scores.rules(64)]
    assert all(len(values) == 14 for values in row["efficiency"].values())
    assert "tau t (the paper's)" in capsys.readouterr().out


def made_up_row(seed: int = 0) -> dict:
    """Evaluations at 1/4, 1/2, 3/4 and the end of a run of 25,000 iterations."""
    return {
        "config": {**CONFIG.to_json(), "iterations": 25_000, "seed": seed},
        "date": "2030-01-02T03:04:05+00:00",
        "machine": {"cpu": "an abacus", "threads": 1},
        "versions": {"fastis": "9"},
        "steps": [2000, 6250, 12_500, 18_750, 25_000],
        "efficiency": {
            "tau t (the paper's)": [9.0, 0.5, 0.4, 0.3, 0.2],
            "tau 1000": [0.0, 0.3, 0.4, 0.5, 0.6],
            "tau 5000": [0.0, 0.6, 0.5, 0.1, 0.6],
            "tau 1000, floor 0.1": [0.0, 0.0, 0.0, 0.0, 0.0],
        },
    }


def test_summary_is_of_the_middle_half_and_against_the_best_fixed_tau_of_each_moment():
    lines = {name: values for name, *values in stale_scores.summary([made_up_row()])}
    assert lines["tau t (the paper's)"] == pytest.approx([0.4, 0.2, 0.2])
    assert lines["tau 1000"] == pytest.approx([0.4, 0.6, 0.4])
    assert lines["tau 5000"] == pytest.approx([0.4, 0.6, 0.3])


def test_section_is_of_the_rows():
    assert stale_scores.NOT_YET in stale_scores.section([])
    text = stale_scores.section([made_up_row(), made_up_row(1)])
    assert "| tau t (the paper's) | 0.400 | 0.200 | 0.200 |" in text
    assert all(words in text for words in ("2 seed(s)", "--seeds 2", "an abacus"))
