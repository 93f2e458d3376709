"""torch.compile: network and loss in one graph, the sampler outside of it.

    python examples/compiled.py [--steps 200] [--backend inductor]

The loss is a registered operator, so nothing breaks the graph; minibatches have one shape, so that
it is compiled once. Compiling takes a minute on a CPU (--backend aot_eager: seconds, but nothing
is faster then); runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import fastis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    y = torch.randint(10, (5000,), device=device)
    x = torch.randn(5000, 64, device=device) * (0.3 + 3 * torch.rand(5000, 1, device=device).pow(4))
    x[torch.arange(5000), y] += 2
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).to(device)
    # A rate that is a tensor can be changed where a compiled or captured step reads it.
    lr = torch.tensor(1e-3, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, capturable=device == "cuda")
    sampler = fastis.Sampler(len(x), batch_size=128, device=device)
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler)

    @torch.compile(fullgraph=True, backend=args.backend)
    def forward(inputs: Tensor, target: Tensor, weights: Tensor) -> fastis.ScoredLoss:
        return fastis.cross_entropy(model(inputs), target, weights)

    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        batch = sampler.sample()
        out = forward(x[batch.indices], y[batch.indices], batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        scheduler.step()
        if step == 1 or step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}: {seconds:.1f} s, loss {out.item():.3f}, {sampler.phase}")
    print(sampler.prediction())


if __name__ == "__main__":
    main()
