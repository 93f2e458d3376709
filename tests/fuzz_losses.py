"""Cases of the losses, against the formulas of torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz import Case
from torch import Tensor

import fastis

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around the widths of vectors, the borders between kernels, one row that is long.
CLASSES = (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 257, 1000)
BATCHES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128)
# Of results near 1; torch's own error in the dtype comes on top.
SLACK = {torch.float64: 1e-12}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def run(case: Case) -> None:
    with fastis.backend("reference" if case.chance(0.15) else "cpu"):
        case.pick(index_targets, index_targets, soft_targets, labels, labels)(case)


def laid_out(case: Case, tensor: Tensor) -> Tensor:
    """The same numbers, somewhere else in memory."""
    layout = case.pick("plain", "plain", "plain", "strided", "offset", "transposed", "negated")
    if layout == "strided":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if layout == "offset":
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[
            min(1, tensor.numel()) :
        ].view_as(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "negated" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    return tensor


def any_logits(case: Case, shape: list[int]) -> Tensor:
    z = torch.randn(shape, dtype=torch.float64, generator=case.generator)
    z = z * case.pick(0.0, 0.1, 1.0, 1.0, 10.0, 80.0)
    if case.chance(0.2):
        z = z + case.pick(-1000.0, 1000.0)
    if case.chance(0.1):
        z[torch.rand(shape, generator=case.generator) < 0.05] = case.pick(
            -math.inf, math.inf, math.nan, 3e4, -3e4
        )
    return z.to(case.pick(*DTYPES))


def any_weighting(case: Case, batch: int) -> dict[str, Any]:
    if case.chance(0.4):
        return {"reduction": case.pick("mean", "sum", "none")}
    weights = torch.rand(batch, generator=case.generator) * case.pick(1.0, 100.0)
    options: dict[str, Any] = {"weights": laid_out(case, weights)}
    options["reduction"] = case.pick("mean", "mean", "sum", "none")
    if options["reduction"] == "mean" and case.chance(0.3):
        options["denominator"] = case.pick(3, 0.5, torch.tensor(7.0))
    return options


def index_targets(case: Case) -> None:
    classes = case.pick(*CLASSES)
    shape = [case.pick(*BATCHES), classes]
    if case.chance(0.25):
        shape = [case.pick(0, 1, 3, 8), case.pick(1, 2, 9), classes]
    logits = any_logits(case, shape)
    target = torch.randint(classes, shape[:-1], generator=case.generator)
    options: dict[str, Any] = {}
    if case.chance(0.3):
        options["class_weights"] = laid_out(case, torch.rand(classes, generator=case.generator))
    if case.chance(0.3):
        options["label_smoothing"] = case.pick(0.1, 0.5, 1.0)
    if case.chance(0.3):
        options["ignore_index"] = case.pick(-100, 0, classes - 1)
        ignored = torch.rand(shape[:-1], generator=case.generator) < case.pick(0.2, 1.0)
        target[ignored] = options["ignore_index"]
    weighting = any_weighting(case, shape[0])
    if case.chance(0.1) and target.numel():
        bad = target.clone()
        bad.view(-1)[-1] = case.pick(classes, -1, 2**40, -(2**62))
        return case.must_raise(lambda: fastis.cross_entropy(logits, bad, **weighting, **options))

    def plain(z: Tensor) -> Tensor:
        class_weights = options.get("class_weights")
        return F.cross_entropy(
            z.flatten(0, -2),
            target.flatten(),
            weight=None if class_weights is None else class_weights.to(z.dtype),
            ignore_index=options.get("ignore_index", -100),
            label_smoothing=options.get("label_smoothing", 0.0),
            reduction="none",
        ).view(target.shape)

    count = float(target.numel())
    if "weights" not in weighting:  # torch's denominator
        kept = target != options.get("ignore_index", -100)
        per_class = options.get("class_weights", torch.ones(classes)).double()
        count = float(per_class[target[kept]].sum())
    target = laid_out(case, target)
    case.count("cross_entropy")
    check(
        case,
        lambda z: fastis.cross_entropy(z, target, **weighting, **options),
        plain, logits, weighting, count,
    )  # fmt: skip


def soft_targets(case: Case) -> None:
    classes = case.pick(*CLASSES)
    shape = [case.pick(*BATCHES), classes]
    logits = any_logits(case, shape).nan_to_num(0, 1e4, -1e4)  # 0 times inf is torch's affair
    target = torch.rand(shape, dtype=torch.float64, generator=case.generator)
    target = (target / target.sum(-1, keepdim=True)).to(case.pick(logits.dtype, torch.float32))
    smoothing = case.pick(0.0, 0.0, 0.1, 1.0)
    weighting = any_weighting(case, shape[0])

    def plain(z: Tensor) -> Tensor:
        t = target.to(z.dtype)
        return F.cross_entropy(z, t, label_smoothing=smoothing, reduction="none")

    placed = laid_out(case, target)
    case.count("soft_targets")
    check(
        case,
        lambda z: fastis.cross_entropy(z, placed, label_smoothing=smoothing, **weighting),
        plain, logits, weighting, float(shape[0]),
    )  # fmt: skip


def labels(case: Case) -> None:
    """Binary cross-entropy and squared errors, of labels of any shape."""
    batch, width = case.pick(*BATCHES), case.pick(*CLASSES)
    shape = case.pick([batch], [batch, width], [batch, width], [batch, 2, 3])
    logits = any_logits(case, shape)
    target = torch.rand(shape, generator=case.generator)
    weighting = any_weighting(case, batch)
    per_label = case.pick(None, "mean", "sum")
    by_sum = per_label == "sum" or (per_label is None and weighting.get("reduction") == "sum")
    over: Callable[[Tensor], Tensor] = torch.sum if by_sum else torch.mean
    options: dict[str, Any] = {"label_reduction": per_label}
    if case.chance(0.5):
        name, public = "bce", fastis.binary_cross_entropy_with_logits
        if case.chance(0.4):
            options["pos_weight"] = torch.rand(shape[1:], generator=case.generator) * 3

        def plain(z: Tensor) -> Tensor:
            each = F.binary_cross_entropy_with_logits(
                z,
                target.to(z.dtype),
                pos_weight=options.get("pos_weight", torch.ones(())).to(z.dtype),
                reduction="none",
            )
            return each if each.dim() == 1 else over(each.flatten(1), 1)

    else:
        name, public = "mse", fastis.mse_loss

        def plain(z: Tensor) -> Tensor:
            each = (z - target.to(z.dtype)).square()
            return each if each.dim() == 1 else over(each.flatten(1), 1)

    placed = laid_out(case, target)
    case.count(name)
    check(
        case,
        lambda z: public(z, placed, **weighting, **options),
        plain, logits, weighting, float(batch),
    )  # fmt: skip


def check(
    case: Case,
    ours: Callable[[Tensor], fastis.ScoredLoss],
    plain: Callable[[Tensor], Tensor],
    logits: Tensor,
    weighting: dict[str, Any],
    count: float,
) -> None:
    """Loss, losses, score, mean gradient and gradient; ``count``: the denominator of the mean."""
    placed = laid_out(case, logits).detach().requires_grad_(case.chance(0.8))
    before = placed.detach().clone()
    out = ours(placed)
    batch = logits.shape[0]
    z = logits.double().requires_grad_()
    each = plain(z)
    (g,) = torch.autograd.grad(each.sum(), z, allow_unused=True)
    losses = each.detach().reshape(batch, math.prod(each.shape[1:])).sum(1)
    norm = g.reshape(batch, math.prod(g.shape[1:])).norm(dim=1)
    r = weighting.get("weights", torch.ones(batch)).double()
    reduction = weighting["reduction"]
    scale = (
        1 / float(weighting.get("denominator") or count or math.nan) if reduction == "mean" else 1
    )
    wanted = r * losses if reduction == "none" else (r * losses).sum() * scale
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert out.loss.dtype == out.losses.dtype == out.score.dtype == result
    slack = SLACK.get(logits.dtype, 2e-6)
    # What a row with inf or NaN gives is documented loss by loss; the other rows don't feel it.
    clean = logits.flatten(1).isfinite().all(1) if logits.dim() > 1 else logits.isfinite()
    size = float(logits[clean].double().abs().max()) if bool(clean.any()) else 0.0
    close("losses", out.losses[clean], losses[clean], slack, size)
    close("score", out.score[clean], norm[clean], 4 * slack, 0.0)
    if bool(clean.all()):
        close("loss", out.loss, wanted, 4 * slack, size * float(r.sum()) * abs(scale))
        rows = r.view(-1, *[1] * (g.dim() - 1)) * g
        if out.mean_grad is not None and batch and math.isfinite(scale):
            terms = rows.reshape(batch, -1)
            # A sum is off in proportion to its terms, of which much may cancel.
            size_of_terms = float(terms.abs().mean(0).amax()) if terms.numel() else 0.0
            close("mean_grad", out.mean_grad, terms.mean(0), 4 * slack, size_of_terms)
        if placed.requires_grad and batch and math.isfinite(scale):
            (grad,) = torch.autograd.grad(out.loss.sum(), placed)
            assert grad.dtype == logits.dtype
            assert grad.shape == logits.shape
            most = float((rows * scale).abs().max())
            rounding = ROUNDING.get(logits.dtype, 0.0)
            close("grad", grad, rows * scale, 4 * slack + rounding, most)
    assert torch.equal(before.nan_to_num(), placed.detach().nan_to_num()), "the logits have changed"


def close(what: str, ours: Tensor, truth: Tensor, slack: float, size: float) -> None:
    """|ours - truth| <= slack (1 + size + |truth|); NaN and inf in the same places."""
    ours, truth = ours.detach().double(), truth.detach()
    assert ours.shape == truth.shape, (what, ours.shape, truth.shape)
    assert torch.equal(ours.isnan(), truth.isnan()), f"{what}: NaN in other places"
    finite = truth.isfinite() & (truth.abs() < 6e4)  # float16 ends there
    infinite = truth.isinf()
    assert torch.equal(ours[infinite], truth[infinite]), f"{what}: inf in other places"
    error = (ours - truth)[finite].abs()
    allowed = slack * (1 + size + truth[finite].abs())
    assert bool((error <= allowed).all()), f"{what}: off by {float((error / allowed).max())} slacks"
