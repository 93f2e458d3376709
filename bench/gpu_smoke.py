"""One launch of every kernel on a GPU, each with a check against the host.

    python bench/gpu_smoke.py --json FILE [--from NAME] [--device cuda]

A row goes into FILE when a case begins and when it ends, so that after a crash (an illegal access
ends every later launch of the process too) it shows which case it was; ``--from`` goes on with the
one after it. ``--device cpu`` rehearses the checks themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import fastis
from bench.bench_sample import scored
from bench.report import append_row, make_parser

Case = Callable[[str], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def follow(
    device: str, steps: int, batch_size: int, n: int, fused: bool, **options: object
) -> None:
    """A sampler on the device and one on the host draw the same from the same scores."""
    host, other = (
        fastis.Sampler(n, batch_size, device=d, seed=3, **options)  # type: ignore[arg-type]
        for d in ("cpu", device)
    )
    expected, drawn = host.sample(), other.sample()
    for step in range(steps):
        assert torch.equal(expected.indices, drawn.indices.cpu()), f"indices differ at step {step}"
        assert torch.equal(expected.weights, drawn.weights.cpu()), f"weights differ at step {step}"
        score = torch.empty(batch_size).log_normal_(0, 2, generator=generator(step))
        host.update(expected, scored(score))
        expected = host.sample()
        if fused:
            drawn = other.update_and_sample(drawn, scored(score.to(device)))
        else:
            other.update(drawn, scored(score.to(device)))
            drawn = other.sample()
    if host.method.has_states:
        states = [sampler.state_dict()["states"].cpu() for sampler in (host, other)]
        assert torch.equal(*states), "states differ"
    torch.testing.assert_close(other.lr_factor().cpu(), host.lr_factor())


NO_WARMUP = fastis.methods.EMAIS(warmup_epochs=0)


@case
def draw_without_replacement(device: str) -> None:
    follow(device, 60, 16, 300, False, method="scan")


@case
def update_and_draw_in_one_block(device: str) -> None:
    follow(device, 60, 16, 300, False)


@case
def update_and_draw_in_many_blocks(device: str) -> None:
    follow(device, 30, 1000, 9000, False, method=NO_WARMUP)


@case
def update_and_draw_in_one_launch(device: str) -> None:
    for batch_size in (64, 1000):
        for flatten in ("cap", "mix"):
            follow(device, 30, batch_size, 9000, True, method=NO_WARMUP, flatten=flatten)


@case
def rescale(device: str) -> None:
    host, other = (
        fastis.Sampler(5000, 64, method=NO_WARMUP, device=d, seed=0) for d in ("cpu", device)
    )
    score = torch.empty(5000).log_normal_(0, 3, generator=generator())
    for sampler, d in ((host, "cpu"), (other, device)):
        everything = fastis.Batch(torch.arange(5000, device=d), torch.ones(5000, device=d))
        sampler.update(everything, scored(score.to(d)))
        fastis.kernels.kernels_for("table", d).rescale(sampler._table)
    assert torch.equal(host.importance, other.importance.cpu()), "weights differ"
    assert torch.equal(host.sample().indices, other.sample().indices.cpu()), "draws differ"


@case
def categorical_and_alias_tables(device: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        values = torch.empty(100_003).log_normal_(0, 2, generator=generator()).clamp(max=6e4)
        values = (values * 1000).long() + 1 if dtype == torch.int64 else values.to(dtype)
        ours, theirs = (of_weights(values.to(d)) for d in (device, "cpu"))
        for name, tensor in theirs.items():
            assert torch.equal(ours[name].cpu(), tensor), f"{name} differs for {dtype}"


def of_weights(values: Tensor) -> dict[str, Tensor]:
    kernels = fastis.kernels.kernels_for("categorical", values.device.type)
    quantized = kernels.quantize(values)
    table = kernels.alias_build(quantized)
    points = kernels.random_below(quantized.total, 5, 3, 10_000, values.device)
    indices, weights = kernels.draw(quantized, 5, 3, 1000)
    drawn, coefficients = kernels.alias_draw(table, quantized.total, 5, 3, 10_000)
    inverse = kernels.alias_inverse_cdf(table, quantized.total, points)
    return {
        "integers": kernels.integer_weights(quantized), "indices": indices, "coefficients": weights,
        "table": table, "draws": drawn, "their coefficients": coefficients, "points": points,
        "inverse_cdf": inverse.indices,
    }  # fmt: skip


@case
def scaling_of_gradients(device: str) -> None:
    from fastis.kernels.cuda import scale as cuda_scale
    from fastis.kernels.reference import loss as reference_loss

    pairs = [(d, d) for d in (torch.float32, torch.float64, torch.bfloat16)]
    for before, after in [*pairs, (torch.float32, torch.float16)]:
        for shape in ((128, 10), (300, 1001), (5, 8, 33)):
            grad = torch.randn(shape, generator=generator()).to(before)
            wide = torch.float64 if before == torch.float64 else torch.float32
            for scale in (torch.tensor(3.0, dtype=wide), torch.rand(shape[0], dtype=wide)):
                expected = reference_loss.scale_grad(grad, scale, after)
                if device == "cpu":
                    continue
                out = torch.empty(shape, dtype=after, device=device)
                ours = cuda_scale.scale(grad.to(device), scale.to(device), out).cpu()
                torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@case
def cross_entropy(device: str) -> None:
    """A launch of every kind: one program, tiles with sums, sweeps, tokens, odd rows."""
    for shape in [(128, 10), (512, 1000), (64, 4097), (33, 50257), (8, 128256), (16, 40, 300)]:
        for dtype in (torch.float32, torch.bfloat16):
            logits = (3 * torch.randn(shape, generator=generator())).to(dtype)
            target = torch.randint(shape[-1], shape[:-1], generator=generator())
            weights = torch.rand(shape[0], generator=generator()) + 0.5
            for smoothing in (0.0, 0.1):
                for r in (weights, None):
                    compare(device, logits, target, r, label_smoothing=smoothing)


def compare(
    device: str, logits: Tensor, target: Tensor, r: Tensor | None, **options: float
) -> None:
    found = []
    for d, dtype in ((device, logits.dtype), ("cpu", torch.float64)):
        leaf = logits.to(d, dtype).requires_grad_()
        weights = None if r is None else r.to(d)
        out = fastis.cross_entropy(leaf, target.to(d), weights, **options)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(out.loss, leaf)
        found.append([out.loss.detach(), out.losses, out.score, grad])
    # Coarse: tests/test_cuda_loss.py has the bounds.
    rtol = 1e-4 if logits.dtype == torch.float32 else 2**-7
    for ours, truth in zip(*found, strict=True):
        atol = 1e-6 * float(truth.abs().max()) + 1e-9
        torch.testing.assert_close(ours.double().cpu(), truth, rtol=rtol, atol=atol)


@case
def elementwise_losses(device: str) -> None:
    for loss in (fastis.binary_cross_entropy_with_logits, fastis.mse_loss):
        logits = torch.randn(512, 100, generator=generator())
        target = torch.rand(512, 100, generator=generator())
        ours, truth = (
            loss(logits.to(d, dtype), target.to(d, dtype))
            for d, dtype in ((device, torch.float32), ("cpu", torch.float64))
        )
        for name in ("loss", "losses", "score", "mean_grad"):
            a, b = getattr(ours, name).double().cpu(), getattr(truth, name)
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@case
def methods_for_comparison(device: str) -> None:
    for name in sorted(set(fastis.methods.BY_NAME) - {"presampling"}):
        sampler = fastis.Sampler(300, 16, method=name, seed=3, device=device)
        for _ in range(60):
            batch = sampler.sample()
            sampler.update(batch, scored((1 + batch.indices % 7).float()))
        assert sampler.step == 60, f"{name}: {sampler.step} updates of 60"
        assert sampler.skipped == 0, f"{name}: {sampler.skipped} scores left out"


def run(name: str, device: str, path: Path) -> bool:
    append_row(path, {"benchmark": "smoke", "case": name, "outcome": "begun"})
    start, outcome = time.perf_counter(), "passed"
    try:
        CASES[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        outcome = f"FAILED: {type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - start, 2)
    append_row(path, {"benchmark": "smoke", "case": name, "outcome": outcome, "seconds": seconds})
    print(f"{name:40s} {seconds:7.2f} s  {outcome}", flush=True)
    return outcome == "passed"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--from", dest="first", choices=CASES, help="the first case to run")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    names = list(CASES)
    begin = names.index(args.first) if args.first else 0
    for number, name in enumerate(names[begin:], begin):
        if run(name, args.device, args.json):
            continue
        if args.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # this process can launch nothing any more
                return 70 if number + 1 < len(names) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
