"""The benchmarks' own parts: data, models, one short training comparison, table and plot."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sweep

import fastis

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import bench_step, report, timing
from bench.experiments import datasets, gradient_variance, loop, make_subset, show, tables, train
from bench.experiments.config import RunConfig, latest
from bench.experiments.datasets import Dataset
from bench.experiments.groups import best_rates, groups_of
from bench.experiments.models import build_model

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
pytestmark = pytest.mark.usefixtures("threads_and_data")


def fashion_file(path: Path, **changes) -> Path:
    """A data set of 40 and 20 random images with the keys of Fashion-MNIST's file."""
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "y_train": np.arange(40, dtype=np.uint8) % 10,
        "x_test": generator.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "y_test": np.arange(20, dtype=np.uint8) % 10,
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def cifar_file(path: Path, images: np.ndarray) -> Path:
    """Both parts hold ``images`` ``[N, H, W, 3]`` as JPEG bytes end to end."""
    image = pytest.importorskip("PIL.Image")
    files = []
    for pixels in images:
        buffer = io.BytesIO()
        image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    arrays = {"class_names": np.array(["a", "b"])}
    for part in ("train", "test"):
        arrays[f"jpeg_{part}"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"offsets_{part}"] = np.cumsum([0, *map(len, files)])
        arrays[f"y_{part}"] = np.arange(len(images), dtype=np.uint8) % 2
    np.savez(path, **arrays)
    return path


# ---- data


def test_subset_is_stratified_and_small():
    assert datasets.EMBEDDED.stat().st_size <= 6e6
    with np.load(datasets.EMBEDDED) as subset:
        assert subset["x_train"].shape == (10_000, 28, 28)
        assert subset["x_test"].shape == (2_000, 28, 28)
        assert subset["x_train"].dtype == subset["y_train"].dtype == np.uint8
        assert np.bincount(subset["y_train"]).tolist() == [1000] * 10
        assert np.bincount(subset["y_test"]).tolist() == [200] * 10


def test_stratified_draws_distinct_rows_of_every_class():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 50))
    rows = make_subset.stratified(labels, 7, np.random.default_rng(2))
    assert len(np.unique(rows)) == 28
    assert np.bincount(labels[rows]).tolist() == [7] * 4


def test_embedded_data_set_spans_minus_one_to_one():
    data = datasets.load_dataset()
    assert data.x_train.shape == (10_000, 1, 28, 28)
    assert data.image_shape == (1, 28, 28)
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == torch.int64
    for images in (data.x_train, data.x_test):
        assert images.aminmax() == (-1.0, 1.0)


def test_environment_names_the_data_and_the_argument_wins(tmp_path, monkeypatch):
    path = fashion_file(tmp_path / "whole.npz")
    monkeypatch.setenv("FASTIS_DATA", str(path))
    assert len(datasets.load_dataset().y_train) == 40
    assert datasets.data_name(None) == "whole.npz"
    assert len(datasets.load_dataset(data=datasets.EMBEDDED).y_train) == 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, ["--data", "y_test missing"]),
        ({"x_train": np.zeros((40, 28, 28), np.float32)}, ["x_train", "uint8", "float32"]),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, ["x_test", "N > 0"]),
        ({"y_train": np.zeros(39, np.uint8)}, ["y_train", "40 integers", "[39]"]),
        ({"y_train": np.full(40, -1)}, ["y_train", "from 0"]),
    ],
)
def test_bad_arrays_are_named(tmp_path, changes, words):
    path = fashion_file(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words below are the match)
        datasets.load_dataset(data=path)
    for word in words:
        assert word in str(error.value)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset must be one of .*got 'mnist'"):
        datasets.load_dataset("mnist")
    with pytest.raises(ValueError, match="--dataset cifar10 needs --data"):
        datasets.load_dataset("cifar10")
    with pytest.raises(FileNotFoundError, match=r"--data must name an \.npz file"):
        datasets.load_dataset(data=tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(ValueError, match=r"--data must name an \.npz file"):
        datasets.load_dataset(data=tmp_path / "text.npz")


def test_cifar_jpegs_are_decoded_in_order(tmp_path):
    flat = np.array([[250, 20, 30], [10, 240, 20], [5, 10, 200]], np.uint8)
    pixels = np.broadcast_to(flat[:, None, None], (3, 32, 32, 3))
    data = datasets.load_dataset("cifar10", cifar_file(tmp_path / "c.npz", pixels))
    assert data.x_train.shape == (3, 3, 32, 32)
    assert data.augment is datasets.random_crop_flip
    # The brightest image of channel c is image c, before and after normalisation.
    assert data.x_train.mean(dim=(2, 3)).argmax(0).tolist() == [0, 1, 2]


def test_augmentation_crops_and_flips():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 8, 8)
    padded = F.pad(images, (2, 2, 2, 2))
    out = datasets.random_crop_flip(images, padding=2)
    found = set()
    for image, source in zip(out, padded, strict=True):
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, source[:, dy : dy + 8, dx : dx + 8])
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == set(range(5))
    assert {flip for _, _, flip in found} == {False, True}


# ---- models


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("lenet5", (1, 28, 28), 44_426),
        ("lenet5", (3, 32, 32), 62_006),
        ("mlp", (1, 28, 28), 203_530),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("cnn", (1, 56, 56), 60_874),
        ("lstm", (28, 28), 82_186),
        ("lstm", (784, 1), 68_362),
    ],
)
def test_models(name, shape, parameters):
    model = build_model(name, shape, 10)
    assert model(torch.randn(2, *shape)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- the comparison


def run_train(out: Path, *more: str) -> list[dict]:
    data = out.parent / "small.npz"
    if not data.exists():
        fashion_file(data)
    arguments = ["--out", str(out), "--data", str(data), "--model", "mlp"]
    assert train.main([*arguments, "--iterations", "12", "--batch-size", "8", *more]) == 0
    return report.read_rows(out / train.RESULTS)


def test_train_writes_rows_table_and_plot_and_resumes(tmp_path, capsys):
    out = tmp_path / "out"
    rows = run_train(out, "--seeds", "2")
    table = capsys.readouterr().out
    assert len(rows) == 6
    assert table.count("±") >= 3 * 4
    for method in ("emais", "scan", "uniform"):
        assert f"\n| {method} " in table
    (png,) = out.glob("*.png")
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    row = rows[0]
    assert row["config"]["data"] == "small.npz"
    assert row["curves"]["step"][-1] == 12
    assert set(row["curves"]) >= {"train_loss", "test_error", "efficiency", "lr"}
    assert {"cpu", "threads"} <= set(row["machine"])
    assert {"torch", "fastis"} <= set(row["versions"])
    assert row["final"]["ms_per_step"] > 0

    # The same again: nothing runs. A third seed: only that one runs. --force: it runs again.
    assert len(run_train(out, "--seeds", "2")) == 6
    assert "6 of 6 runs" in capsys.readouterr().out
    assert len(run_train(out, "--seeds", "3", "--method", "scan", "--no-plot")) == 7
    again = run_train(out, "--seeds", "1", "--method", "scan", "--force", "--no-plot")
    assert len(again) == 8
    first = next(row for row in rows if row["config"]["method"] == "scan")
    assert again[-1]["final"]["train_loss"] == first["final"]["train_loss"]


def test_train_adam_grid_with_two_jobs(tmp_path, capsys):
    options = ["--optimizer", "adam", "--lr", "0.001", "0.002", "--lr-factor", "1.5"]
    options += ["--method", "emais", "uniform", "--seeds", "1", "--jobs", "2"]
    rows = run_train(tmp_path / "out", *options)
    lrs = {(row["config"]["method"], row["config"]["lr"]) for row in rows}
    assert lrs == {("emais", 0.001), ("emais", 0.002), ("uniform", 0.0015), ("uniform", 0.003)}
    assert str(tmp_path) not in (tmp_path / "out" / train.RESULTS).read_text()
    capsys.readouterr()
    png = tmp_path / "again.png"
    assert show.main([str(tmp_path / "out" / train.RESULTS), "--out", str(png)]) == 0
    assert png.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "nonsense"], "nonsense"),
        (["--data", "absent.npz"], "absent.npz"),
        (["--lr", "-1"], "above 0"),
        (["--dataset", "cifar10"], "--data"),
    ],
)
def test_train_refuses_before_it_runs(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path), *options])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- table and step time


def made_up_row(method: str, seed: int, loss: float | None, lr: float = 0.01) -> dict:
    """A row as of a run whose train loss fell to ``loss`` in two evaluations."""
    final = dict.fromkeys(("efficiency", "relative_batch_size", "lr_factor", "seconds"), 1.0)
    final |= {"test_error": loss and 100 * loss, "train_loss": loss}
    curves = {"step": [1, 2], "seconds": [1.0, 2.0], "train_loss": [0.5, loss]}
    config = RunConfig(method, lr, seed).to_json()
    return {"config": config, "final": final, "curves": curves}


def test_table_means_deviations_and_differences(capsys):
    rows = [made_up_row("emais", 0, 0.10), made_up_row("emais", 1, 0.12)]
    rows += [made_up_row("scan", 0, 0.13), made_up_row("scan", 1, 0.16)]
    rows += [made_up_row("uniform", 0, 0.10), made_up_row("uniform", 1, None)]
    show.show(rows, None)
    text = capsys.readouterr().out
    emais, scan, uniform = text.splitlines()[2:5]
    assert "11.00 ± 1.41 | 0.1100 ± 0.0141" in emais
    assert "-3.50 ± 6.35" in emais  # 12.706 * 0.7071 / sqrt(2)
    assert scan.count(" - |") == 2
    assert "diverged" in uniform
    assert "train loss: 0.1100 ± 0.0141 against 0.1450 ± 0.0212, -24 %" in text
    until = [" ".join(line.split()) for line in text.split("Until")[1].splitlines()]
    assert "| emais | 0.01 | 2 of 2 | 2 ± 0 | 2.0 ± 0.0 |" in until
    assert "| uniform | 0.01 | 1 of 2 | 2 | 2.0 |" in until


def test_the_main_job_has_the_rates_that_its_rows_choose():
    best = best_rates(groups_of(report.read_rows(train.SEARCHED)))
    assert {group.config.method: group.config.lr for group in best.values()} == train.BEST_RATE
    args = train.arguments().parse_args(["--rates"])
    wanted = train.configurations(args, "embedded")
    rows = latest(report.read_rows(train.SEARCHED))
    assert rows.keys() <= wanted.keys()
    # Its two neighbours were run as often as the best rate.
    at = train.RATES.index(0.07)
    assert all(c.key in rows for c in wanted.values() if c.lr in train.RATES[at - 1 : at + 2])


def test_by_default_each_method_has_its_own_rate():
    def lrs(*options):
        configs = train.configurations(train.arguments().parse_args(options), "embedded")
        return {(config.method, config.lr) for config in configs.values()}

    assert lrs() == set(train.BEST_RATE.items())
    assert lrs("--optimizer", "adam", "--method", "emais") == {("emais", 0.001)}
    assert lrs("--method", "scan", "--lr", "0.5", "--lr-factor", "2") == {("scan", 1.0)}


def test_averages_of_a_run_leave_out_what_is_undefined():
    readings = [{"efficiency": value} for value in (0.5, math.nan, 0.7)]
    assert loop.mean_of(readings, "efficiency") == pytest.approx(0.6)
    assert math.isnan(loop.mean_of(readings[1:2], "efficiency"))
    assert loop.lower_quartile([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 90.0, 7.0]) == 3.0
    assert loop.json_number(math.nan) is None


def test_latest_row_of_a_configuration_wins():
    rows = [made_up_row("emais", 0, 0.10), made_up_row("scan", 0, 0.09)]
    rows.append(made_up_row("emais", 0, 0.08))
    assert [row["final"]["train_loss"] for row in latest(rows).values()] == [0.08, 0.09]


def test_broken_results_file_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"config": {}}\n{"conf')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2"):
        report.read_rows(tmp_path / "results.jsonl")


def test_step_benchmark_writes_a_row(tmp_path, capsys):
    rows = tmp_path / "step.jsonl"
    options = ["--model", "mlp", "--num-samples", "2000", "--pairs", "4", "--seconds", "0.01"]
    assert bench_step.main([*options, "--json", str(rows)]) == 0
    assert "mlp" in capsys.readouterr().out
    row = json.loads(rows.read_text())
    assert row["ratio"] > 0
    assert row["num_samples"] == 2000
    assert {"machine", "versions", "date"} <= set(row)


def test_tile_repeats_in_order():
    x = torch.arange(3.0)
    tiled = bench_step.tile(Dataset("three", x, x.long(), x, x.long(), 3), 7)
    assert tiled.x_train.tolist() == tiled.y_train.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_differences_are_to_the_runs_that_are_named(capsys):
    rows = str(Path(report.__file__).parent / "results" / "fashion_mnist_lenet5.jsonl")
    assert show.main([rows, "--compared-with", "scan:0.01"]) == 0
    text = capsys.readouterr().out
    assert "test error minus scan 0.01" in text
    (scan,) = (line for line in text.splitlines() if line.split()[:4] == ["|", "scan", "|", "0.01"])
    assert scan.split()[-4:] == ["-", "|", "-", "|"]
    with pytest.raises(SystemExit):
        show.main([rows, "--compared-with", "emais:7"])
    assert "got emais:7" in capsys.readouterr().err


def test_paired_interval_by_hand():
    first, second = {0: 1.0, 1: 3.0, 2: 2.0, 7: 9.0}, {0: 0.0, 1: 1.0, 2: 1.0}
    mean, half, seeds = tables.paired_interval(first, second)
    assert (mean, seeds) == (pytest.approx(4 / 3), 3)
    assert half == pytest.approx(4.303 / 3)  # the differences' deviation is 1 / sqrt(3)
    with pytest.raises(ValueError, match="2 to 10 common seeds, got 1"):
        tables.paired_interval({0: 1.0}, {0: 2.0})


# ---- the timer


def test_cases_take_turns_and_the_first_one_changes():
    order, clock = [], {"a": 1.0, "b": 3.0}
    cases = {name: lambda name=name: order.append(name) for name in clock}

    def timed(function, calls):
        function()
        return calls * clock[order[-1]]

    times = timing.interleaved(cases, rounds=4, calls=10, clock=timed)
    assert order == ["a", "b", "b", "a"] * 2
    assert times == {"a": [1.0] * 4, "b": [3.0] * 4}
    assert times.us("b") == 3e6


def test_a_turn_is_as_long_as_it_shall_be():
    def timed(function, calls):
        return calls * 1e-4

    assert timing.calls_in(lambda: None, 0.01, timed) == 100
    assert timing.calls_in(lambda: None, 1e-5, timed) == 1  # slow ones: once a turn


def test_ratios_are_taken_within_a_round_with_their_quartiles():
    times = timing.Times({"a": [1.5, 2.0, 5.0], "b": [1.0, 2.0, 4.0]})
    ratio = times.ratio("a", "b")
    assert ratio == (1.125, 1.25, 1.375)
    assert ratio.text(".2f") == "1.25 (1.12 to 1.38)"
    assert timing.spread([2.0]) == (2.0, 2.0, 2.0)


def test_tables_are_markdown():
    lines = [("what", "us"), ("draw", "1.25"), ("update, draw", "10")]
    assert report.markdown_table(lines).splitlines() == [
        "| what         |   us |",
        "| ------------ | ---: |",
        "| draw         | 1.25 |",
        "| update, draw |   10 |",
    ]
    unaligned = report.markdown_table(lines, aligned=False).splitlines()
    assert unaligned[:3] == ["| what | us |", "| --- | ---: |", "| draw | 1.25 |"]


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_exact_traces_are_what_draws_scatter_by(scheme):
    n, batch_size, draws = 300, 16, 4000
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    sampler = fastis.Sampler(
        n, batch_size, method=fastis.methods.EMAIS(warmup_epochs=0), scheme=scheme
    )
    score = torch.empty(n).log_normal_(0, 1.5, generator=generator)  # some reach the cap
    sweep(sampler, score)
    layout = gradient_variance.Layout(sampler)
    assert torch.equal(layout.order.sort().values, torch.arange(n))
    traces = gradient_variance.scheme_traces(layout, g)
    squares = []
    for _ in range(draws):
        batch = sampler.sample()
        estimate = (batch.weights.double()[:, None] * g[batch.indices]).mean(0)
        squares.append((estimate - g.mean(0)).square().sum())
    squares = torch.stack(squares)
    # Beyond 5 standard errors about once in 1.7 million.
    error = abs(float(squares.mean()) - traces[scheme])
    assert error < 5 * float(squares.std()) / draws**0.5
