"""Misuse that would go on in silence is heard: once where it may be meant, else as an error."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import batch_of, drive, losses_of, observe, sweep
from torch.utils import _pytree as pytree

import fastis
from fastis import misuse
from fastis.methods import EMAIS

x, y = torch.randn(50, 4), torch.randint(3, (50,))
logits = torch.randn(50, 3, requires_grad=True)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def ready(**options):
    """A sampler whose minibatches have coefficients."""
    sampler = fastis.Sampler(50, 5, method=EMAIS(warmup_epochs=0), seed=0, **options)
    sweep(sampler, torch.rand(50))
    return sampler


# No update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "patience"), [(50, misuse.LEAST_PATIENCE), (1000, 200)])
def test_an_epoch_of_draws_without_update_is_warned_of_once(any_backend, n, patience):
    sampler = fastis.Sampler(n, 5, seed=0)
    for _ in range(patience - 1):
        sampler.sample()
    with pytest.warns(UserWarning, match=f"^{patience} minibatches drawn and no update") as heard:
        sampler.sample()
    assert heard[0].filename == __file__
    for _ in range(2 * patience):
        sampler.sample()


def test_who_updates_hears_nothing(any_backend):
    sampler, other = fastis.Sampler(50, 5, seed=0), fastis.Sampler(50, 5, seed=0)
    drive(sampler, 1)
    other.load_state_dict(sampler.state_dict())
    for late in (sampler, other, ready()):
        for _ in range(2 * misuse.LEAST_PATIENCE):
            late.sample()
    ahead = [sampler.sample() for _ in range(misuse.LEAST_PATIENCE - 1)]  # of a loader
    assert len(ahead) == misuse.LEAST_PATIENCE - 1


@pytest.mark.parametrize("method", ["scan", "uniform"])
def test_methods_that_learn_nothing_need_no_update(method):
    sampler = fastis.Sampler(50, 5, method=method)
    for _ in range(2 * misuse.LEAST_PATIENCE):
        sampler.sample()


def test_an_update_that_fails_is_none():
    sampler = fastis.Sampler(50, 5)
    with pytest.raises(ValueError, match=r"out.score must have shape"):
        sampler.update(sampler.sample(), losses_of(1.0))
    for _ in range(misuse.LEAST_PATIENCE - 2):
        sampler.sample()
    with pytest.warns(UserWarning, match="no update"):
        sampler.sample()


# Too many updates --------------------------------------------------------------------------------


def test_an_epoch_of_updates_more_than_draws_is_warned_of_once(any_backend):
    sampler = fastis.Sampler(50, 5, seed=0)
    for _ in range(misuse.LEAST_PATIENCE):  # each minibatch twice
        batch = sampler.sample()
        for _ in range(2):
            sampler.update(batch, torch.ones(5))
    batch = sampler.sample()
    sampler.update(batch, torch.ones(5))
    advice = (
        r"^101 more updates than minibatches drawn.*in one list.*sampler.refresh\(indices, out\)"
    )
    with pytest.warns(UserWarning, match=advice) as heard:
        sampler.update(batch, torch.ones(5))
    assert heard[0].filename == __file__
    for _ in range(3 * misuse.LEAST_PATIENCE):
        sampler.update(batch, torch.ones(5))


def test_an_evaluation_pass_by_updates_is_heard():
    sampler = fastis.Sampler(1000, 5, seed=0)
    drive(sampler, 400)
    parts = [fastis.Batch(i, torch.ones(4)) for i in torch.arange(1000).split(4)]
    for part in parts[:200]:
        sampler.update(part, torch.ones(4))
    with pytest.warns(UserWarning, match="201 more updates than minibatches drawn"):
        sampler.update(parts[200], torch.ones(4))


def test_updates_that_are_meant():
    sampler = fastis.Sampler(50, 5, seed=0)
    for _ in range(3 * misuse.LEAST_PATIENCE):  # a table of scores, and draws of one's own
        sampler.update(batch_of(1, 2, 3), torch.ones(3))
    late, ahead = ready(), [ready().sample() for _ in range(60)]
    late.sample()
    for batch in ahead:  # of the run that was resumed
        late.update(batch, torch.ones(5))
    batch = late.sample()
    for _ in range(3 * misuse.LEAST_PATIENCE):
        batch = late.update_and_sample(batch, torch.ones(5))


# No coefficients ---------------------------------------------------------------------------------


def of_rows(batch, loss=fastis.cross_entropy, **options):
    z = logits[batch.indices]
    if loss is fastis.cross_entropy:
        return loss(z, y[batch.indices], **options)
    if loss is fastis.scored_loss:
        return loss(lambda p, t: F.cross_entropy(p, t, reduction="none"), z, y[batch.indices])
    if loss is fastis.from_losses:
        return loss(F.cross_entropy(z, y[batch.indices], reduction="none"), None)
    return loss(z, torch.zeros_like(z), **options)


LOSSES = [
    *(fastis.cross_entropy, fastis.binary_cross_entropy_with_logits, fastis.mse_loss),
    *(fastis.scored_loss, fastis.from_losses),
]


@pytest.mark.parametrize("form", ["whole", "parts"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_loss_without_the_coefficients_is_warned_of_once(any_backend, loss, form):
    sampler = ready()
    batch = sampler.sample()
    out = of_rows(batch, loss)
    assert isinstance(out, fastis.ScoredLoss)
    assert not out.weighted
    if form == "parts":
        halves = [fastis.Batch(*(t[at] for t in batch)) for at in (slice(2), slice(2, 5))]
        out = [of_rows(half, loss) for half in halves]
    with pytest.warns(UserWarning, match="pass batch.weights to the loss") as heard:
        sampler.update(batch, out)
    assert heard[0].filename == __file__
    for _ in range(64):  # twice the updates between two looks
        sampler.update(batch, out)
    assert sampler.step == 66


def test_it_is_found_after_the_warm_up():
    sampler = fastis.Sampler(50, 5, seed=0)
    batch, heard = sampler.sample(), None
    for _ in range(20 + 32):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            following = sampler.update_and_sample(batch, of_rows(batch))
        if caught:
            assert heard is None
            heard = batch
        batch = following
    assert heard is not None
    assert not (heard.weights == 1).all()


@pytest.mark.parametrize(
    ("make", "weighted"),
    [
        (lambda b: of_rows(b, weights=b.weights), True),
        (lambda b: of_rows(b, reduction="none"), True),  # weighted by the user, it may be
        (lambda b: of_rows(b, fastis.mse_loss, reduction="none"), True),
        (lambda b: fastis.cross_entropy(logits.detach()[b.indices], y[b.indices]), True),
        (lambda b: fastis.ScoredLoss(torch.ones(()), torch.ones(5), torch.ones(5)), True),
        (lambda b: observe(torch.ones(5)), None),
        (lambda b: torch.ones(5), None),
        (lambda b: [of_rows(fastis.Batch(b.indices[:1], b.weights[:1]), weights=b.weights[:1])] * 5,
         None),
    ],
)  # fmt: skip
def test_nothing_is_said_of_what_may_be_right(make, weighted):
    sampler = ready()
    for _ in range(40):
        batch = sampler.sample()
        out = make(batch)
        assert getattr(out, "weighted", None) is weighted
        sampler.update(batch, out)


def test_where_all_coefficients_are_1_none_is_missed():
    sampler = ready()
    everything = fastis.Batch(torch.arange(50), torch.ones(50))  # an evaluation sweep
    for _ in range(40):
        sampler.update(everything, fastis.cross_entropy(logits, y))
    scan = fastis.Sampler(50, 5, method="scan")
    for _ in range(40):
        batch = scan.sample()
        scan.update(batch, of_rows(batch))


def test_a_loss_without_coefficients_is_a_tuple_as_any():
    out = fastis.cross_entropy(logits, y)
    assert type(pickle.loads(pickle.dumps(out._replace(loss=out.loss.detach())))) is type(out)
    halved = pytree.tree_map(lambda t: t / 2, out)
    assert type(halved) is type(out)
    torch.testing.assert_close(halved.losses, out.losses / 2)
    loss, losses, score, mean_grad = out
    assert (loss, losses, score, mean_grad) == tuple(out)


# Other indices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.int, torch.Tensor.tolist])
def test_indices_that_the_data_set_returned(any_backend, kind):
    sampler = ready()
    batch = sampler.sample()
    sampler.update(batch, torch.ones(5), indices=kind(batch.indices))
    sampler.update(batch, torch.ones(5), indices=batch.indices.numpy())
    assert sampler.step == 3


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([4, 3, 7, 1, 2], ValueError, r"indices\[2\] must be 2, as drawn, got 7"),
        ([4, 3, 2, 1], ValueError, r"indices must have shape \[5\], as batch.indices, got \[4\]"),
        (
            torch.tensor([4.0, 3, 2, 1, 0]),
            TypeError,
            "indices must hold integers, got torch.float32",
        ),
        (torch.ones(5).bool(), TypeError, "indices must hold integers, got torch.bool"),
    ],
)
def test_indices_of_another_minibatch_are_an_error(any_backend, indices, error, message):
    sampler = ready()
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.update(batch_of(4, 3, 2, 1, 0), torch.ones(5), indices=indices)
    after = sampler.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("states", "scalars", "variance"))


# As something else --------------------------------------------------------------------------------


def test_a_data_set_in_place_of_its_length():
    with pytest.raises(TypeError, match=r"num_samples must be an int, got TensorDataset: pass its"):
        fastis.Sampler(torch.utils.data.TensorDataset(x, y), 5)


def test_another_method_in_mid_run():
    with pytest.raises(AttributeError, match=r"'emais', .*'scan': .* set sampler.uniform = True"):
        ready().method = "scan"


# As torch's sampler ------------------------------------------------------------------------------


def test_it_is_no_torch_sampler():
    sampler = ready()
    advice = r"use fastis.DataLoader\(dataset, sampler\)"
    loader = torch.utils.data.DataLoader(list(range(50)), sampler=sampler, batch_size=5)
    for use in (lambda: list(loader), lambda: list(sampler), lambda: dict(enumerate(sampler))):
        with pytest.raises(TypeError, match=advice):
            use()
    for use in (lambda: len(loader), lambda: len(sampler)):
        with pytest.raises(TypeError, match=r"no length.*fastis.DataLoader\(dataset, sampler\)"):
            use()
    loader = torch.utils.data.DataLoader(list(range(50)), batch_sampler=sampler)
    with pytest.raises(TypeError, match=advice):
        next(iter(loader))
    assert sampler


# Several processes -------------------------------------------------------------------------------


@pytest.fixture
def processes(monkeypatch):
    def start(count):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)

    return start


def test_several_processes_need_a_word(processes):
    early, alone = fastis.Sampler(50, 5), fastis.Sampler(50, 5, group=False)
    processes(3)
    message = r"torch.distributed has 3 processes.*group=<process group>.*group=False"
    with pytest.raises(ValueError, match=message):
        fastis.Sampler(50, 5)
    with pytest.raises(ValueError, match=message):
        early.sample()
    alone.sample()
    sampler = pickle.loads(pickle.dumps(fastis.Sampler(50, 5, group=False)))
    sampler.sample()
    processes(1)
    early.sample()
    fastis.Sampler(50, 5)


def test_the_group_is_no_part_of_the_state(processes):
    theirs, sampler = fastis.Sampler(50, 5), fastis.Sampler(50, 5, group=False)
    drive(theirs, 5)
    sampler.load_state_dict(theirs.state_dict())
    assert torch.equal(sampler.sample().indices, theirs.sample().indices)


def test_groups_that_are_none():
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group that"):
        fastis.Sampler(50, 5, group=3)
    with pytest.raises(TypeError, match="got bool True"):
        fastis.Sampler(50, 5, group=True)
    with pytest.raises(TypeError, match="got int -100"):
        fastis.Sampler(50, 5, group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
