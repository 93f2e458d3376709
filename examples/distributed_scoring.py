"""A trainer, and scorer processes that tell it which samples matter (Alain et al. 2016).

    python examples/distributed_scoring.py [--scorers 2] [--steps 400]

The trainer starts its scorers, which find it by an address; on another machine or by hand:

    python examples/distributed_scoring.py --scorer HOST:PORT

Kill one while it runs: the training goes on. Seconds on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

import fastis
from fastis.scoring import Inbox, Scorer


def data(num_samples: int) -> tuple[Tensor, Tensor]:
    """Four classes, of which a few samples are far noisier than the others."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(4, (num_samples,), generator=generator)
    noise = 0.3 + 4 * torch.rand(num_samples, 1, generator=generator).pow(4)
    x = torch.randn(num_samples, 20, generator=generator) * noise
    x[torch.arange(num_samples), y] += 1
    return x, y


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))


def score(address: str, num_samples: int) -> None:
    """A scorer's whole life: it ends when the trainer does."""
    torch.set_num_threads(1)
    x, y = data(num_samples)
    model = network().eval()
    scorer = Scorer(
        model,
        lambda indices: fastis.cross_entropy(model(x[indices]), y[indices]),
        len(x),
        store=address,
    )
    print(f"a scorer ends after {scorer.run()} minibatches")


def train(num_scorers: int, num_samples: int, total_steps: int) -> None:
    torch.manual_seed(0)
    x, y = data(num_samples)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    sampler = fastis.Sampler(len(x), batch_size=64, method="distributed", seed=0)
    with Inbox(sampler) as inbox:
        command = [sys.executable, __file__, "--scorer", inbox.address]
        command += ["--samples", str(num_samples)]
        scorers = [subprocess.Popen(command) for _ in range(num_scorers)]
        inbox.publish(model, 0)
        while num_scorers and not inbox.fold():  # only since this run is shorter than their start
            time.sleep(0.05)
        for step in range(total_steps):
            inbox.publish(model, step)  # at once, also while the last ones are on their way
            inbox.fold()  # whatever has arrived
            batch = sampler.sample()
            out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            if (step + 1) % 100 == 0:
                s = inbox.stats()
                print(
                    f"step {step + 1}: {s['scorers']} scorers, {s['folded']:,} scores, "
                    f"trace ideal {s['ideal']:.3f}, stale {s['stale']:.3f}, "
                    f"uniform {s['uniform']:.3f}"
                )
    for process in scorers:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scorers", type=int, default=2)
    parser.add_argument("--scorer", default="", metavar="HOST:PORT", help="be one, of that trainer")
    args = parser.parse_args()
    if args.scorer:
        score(args.scorer, args.samples)
    else:
        train(args.scorers, args.samples, args.steps)


if __name__ == "__main__":
    main()
