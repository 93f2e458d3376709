"""Pictures of a sampler, of every phase and method, and the scalars of a logger."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batch_of, drive, losses_of
from test_monitor import method_named

import fastis
from fastis import methods
from fastis.kernels.flatten import distribution
from fastis.methods import EMAIS

matplotlib = pytest.importorskip("matplotlib")
N, B = 400, 20


def trained(steps=60, **options):
    sampler = fastis.Sampler(options.pop("n", N), B, seed=3, **options)
    drive(sampler, steps)
    return sampler


def drawn(figure) -> bytes:
    """Rendering is where matplotlib finds most faults."""
    buffer = io.BytesIO()
    with np.errstate(all="raise"):
        figure.savefig(buffer, dpi=40)
    return buffer.getvalue()


def texts(axes) -> str:
    legend = axes.get_legend()
    found = [*axes.texts, axes.title, *(legend.get_texts() if legend else [])]
    return " | ".join(text.get_text() for text in found)


@pytest.mark.parametrize(
    ("name", "steps"),
    [*(("emais", steps) for steps in (0, 1, 25)), *((name, 60) for name in methods.BY_NAME)],
)
def test_every_method_in_every_phase(name, steps):
    sampler = fastis.Sampler(N, B, method=method_named(name), seed=3)
    drive(sampler, steps)
    figure = fastis.plot(sampler)
    if name in ("emais", "scan"):
        assert drawn(figure)[:4] == b"\x89PNG"
    importance, staleness, *_ = figure.axes
    for axes in (importance, staleness):
        expected = "keeps no state" if not sampler.method.has_states else "no sample has been seen"
        assert (expected in texts(axes)) == (steps == 0 or not sampler.method.has_states)
    assert f"step {steps}, {sampler.phase}, method {name!r}" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("n", "cap", "flatten"),
    [(N, B / N, "cap"), (N, 0.2, "mix"), (N, B, "cap"), (B, 1.0, "cap"), (B, 2.0, "cap")],
)
def test_every_cap(n, cap, flatten):
    drawn(fastis.plot(trained(n=n, max_duplicates=cap, flatten=flatten)))


def test_the_cap_is_where_probabilities_stop_to_grow():
    sampler = trained(400, max_duplicates=0.2)
    capped = distribution(sampler._table).capped
    assert 3 < len(capped) < N / 2
    axes = fastis.plot(sampler).axes[0]
    (line,) = axes.lines
    at = line.get_xdata()[0] * float(sampler.importance.double().mean())
    beyond = (sampler.importance > at).nonzero().flatten()
    assert beyond.tolist() == capped.tolist()


def test_the_histogram_counts_the_seen_and_the_unseen_apart():
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=0)
    sampler.refresh(torch.arange(30), 1 + torch.rand(30))
    axes = fastis.plot(sampler).axes[0]
    counts = [patch.get_height() for patch in axes.patches]
    assert sum(counts[:-1]) == 30
    unseen = axes.patches[-1]
    assert unseen.get_height() == N - 30
    assert unseen.get_x() <= 1 <= unseen.get_x() + unseen.get_width()
    assert "seen: 30 |" in texts(axes)
    assert "unseen: 370 (92.5%)" in texts(axes)
    sampler.update(batch_of(0), losses_of(1.0))
    staleness = fastis.plot(sampler).axes[1]
    assert [patch.get_height() for patch in staleness.patches] == [0, 30]  # one iteration ago


def test_history_makes_curves():
    sampler, history = fastis.Sampler(N, B, seed=3), []
    for _ in range(5):
        drive(sampler, 20)
        history.append(sampler.stats())
    figure = fastis.plot(sampler, history)
    drawn(figure)
    sizes, shares = figure.axes[2:]
    for axes, keys, scale in (
        (sizes, ("effective_batch_size", "gain"), (B, 1)),
        (shares, ("efficiency", "share_unseen"), (1, 1)),
    ):
        for line, key, by in zip(axes.lines, keys, scale, strict=True):
            assert list(line.get_xdata()) == [20, 40, 60, 80, 100, 100]
            records = [*history, sampler.stats()]
            np.testing.assert_allclose(line.get_ydata(), [r[key] / by for r in records])
    assert f"gain: {sampler.stats()['gain']:.3g}" in texts(sizes)
    alone = fastis.plot(sampler).axes[2]
    assert f"{sampler.stats()['gain']:.3g}" in texts(alone)
    assert "not known" in texts(fastis.plot(fastis.Sampler(N, B)).axes[2])


def test_pyplot_knows_nothing_of_it():
    fastis.plot(trained())
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    images = torch.rand(N, 4, 4)
    for draw in (lambda s: fastis.plot(s), lambda s: fastis.contact_sheet(s, images)):
        with pytest.raises(ImportError, match=r"pip install 'fastis\[plot\]'"):
            draw(trained())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "sampler must be a fastis.Sampler, got int"),
        ((trained(), "no"), TypeError, "history must be a list of sampler.stats"),
        ((trained(), [{"gain": 1.0}]), ValueError, r"history\[0\] must be a sampler.stats\(\)"),
    ],
)
def test_what_can_not_be_plotted(arguments, error, message):
    with pytest.raises(error, match=message):
        fastis.plot(*arguments)


# Contact sheets ----------------------------------------------------------------------------------


def known(count=N):
    """Sample i has importance i + 1; the last two have not been seen."""
    sampler = fastis.Sampler(count, 4, method=EMAIS(warmup_epochs=0, floor=1e-3), seed=0)
    sampler.refresh(torch.arange(count - 2), torch.arange(1.0, count - 1))
    return sampler


def shown(figure):
    """Of each half: the titles' indices, and the images."""
    halves = []
    for part in figure.subfigs:
        axes = [a for a in part.axes if a.images]
        indices = [int(a.get_title().split("\n")[0].split(":")[0]) for a in axes]
        halves.append((indices, [a.images[0].get_array() for a in axes], axes))
    return halves


@pytest.mark.parametrize("count", [1, 5, 30])
def test_the_most_and_the_least_important(count):
    images = torch.arange(40).view(40, 1, 1).expand(40, 3, 5).to(torch.uint8)
    figure = fastis.contact_sheet(known(40), images, labels=torch.arange(40) + 100, count=count)
    drawn(figure)
    (most, pixels, axes), (least, _, _) = shown(figure)
    each = min(count, 19)  # of 38 that have been seen
    assert most == list(range(37, 37 - each, -1))
    assert least == list(range(each))
    assert float(pixels[0][0, 0]) == pytest.approx(37 / 255)
    assert pixels[0].shape == (3, 5)
    assert axes[0].get_title() == f"37: 137\n{38 / 19.5:.2g}"


class Pairs:
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.make(i)


pixels = torch.rand(10, 6, 7)
DATA = {
    "tensor": (pixels, 2),
    "one channel": (pixels[:, None], 2),
    "three channels": (pixels[:, None].expand(10, 3, 6, 7), 3),
    "channels last": (pixels[..., None].expand(10, 6, 7, 3), 3),
    "bfloat16": (pixels.bfloat16(), 2),
    "numpy": (pixels.numpy(), 2),
    "constant": (torch.full((10, 6, 7), 3.0), 2),
    "pairs": (Pairs(lambda i: (pixels[i], i)), 2),
    "alone": (Pairs(lambda i: (pixels[i],)), 2),
    "as PIL": (Pairs(lambda i: (np.zeros((6, 7, 3), np.uint8), i)), 3),
}


@pytest.mark.parametrize("kind", DATA)
def test_images_of_every_kind(kind):
    data, dims = DATA[kind]
    figure = fastis.contact_sheet(known(10), data, count=2)
    drawn(figure)
    (_, images, _), _ = shown(figure)
    assert len(images) == 2
    for image in images:
        assert image.shape == (6, 7, 3)[:dims]
        assert 0 <= image.min() <= image.max() <= 1


def test_a_single_sample_that_has_been_seen():
    sampler = fastis.Sampler(10, 2, method=EMAIS(warmup_epochs=0))
    sampler.refresh(torch.tensor([4]), torch.ones(1))
    (most, _, _), (least, _, _) = shown(fastis.contact_sheet(sampler, pixels))
    assert most == least == [4]


@pytest.mark.parametrize(
    ("sampler", "data", "error", "message"),
    [
        (known(10), torch.rand(9, 4, 4), ValueError, r"dataset must .* num_samples=10.*got 9"),
        (known(10), torch.rand(10, 4), ValueError, r"dataset\[7\] must be an image of shape"),
        (known(10), torch.rand(10, 2, 4, 4), ValueError, r"dataset\[7\] must be an image of shape"),
        (fastis.Sampler(10, 2), pixels, ValueError, "sampler must have seen samples"),
        (fastis.Sampler(10, 2, method="scan"), pixels, ValueError, "keeps a state.*got 'scan'"),
    ],
)  # fmt: skip
def test_what_is_no_sheet(sampler, data, error, message):
    with pytest.raises(error, match=message):
        fastis.contact_sheet(sampler, data)


# Loggers -----------------------------------------------------------------------------------------


def test_tensorboard_reads_what_was_logged(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sampler, logged = fastis.Sampler(N, B, seed=3), []
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for step in (0, 25, 50):
            logged.append(fastis.log(sampler, writer, step, full=step == 50))
            drive(sampler, 25)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"fastis/{name}" for name in logged[-1]}
    for name in ("gain", "share_unseen", "effective_batch_size", "staleness"):
        known = [(s, r[name]) for s, r in zip((0, 25, 50), logged, strict=True)
                 if r.get(name, np.nan) == r.get(name, np.nan)]  # fmt: skip
        found = [(e.step, e.value) for e in events.Scalars(f"fastis/{name}")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in known]
    assert len(events.Scalars("fastis/effective_batch_size")) == 2  # NaN at first


@pytest.mark.parametrize("name", ["log", "log_metrics"])
def test_a_run_gets_one_record(name):
    records = []
    writer = SimpleNamespace(**{name: lambda record, step: records.append((step, record))})
    sampler = trained()
    stats = fastis.log(sampler, writer, 7, prefix="is.")
    assert stats == sampler.stats()
    assert records == [(7, {f"is.{key}": value for key, value in stats.items()})]
    fastis.plot(sampler, [stats])


def test_what_is_no_logger():
    with pytest.raises(TypeError, match=r"writer must have add_scalar .* got object"):
        fastis.log(trained(), object(), 1)
    with pytest.raises(TypeError, match="step must be an int, got None"):
        fastis.log(trained(), SimpleNamespace(log=print), None)
    with pytest.raises(TypeError, match=r"sampler must be a fastis.Sampler, got dict"):
        fastis.log({}, SimpleNamespace(log=print), 1)
