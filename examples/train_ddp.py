"""DistributedDataParallel: one global distribution over all processes, on Fashion-MNIST.

    torchrun --nproc-per-node 2 examples/train_ddp.py [--epochs 6] [--checkpoint last.pt]

Two processes draw and learn what one does (``python examples/train_ddp.py``), each half of it: the
global minibatch, the learning rate and, up to rounding, the network are the same. Start it again
with the same --checkpoint, and with another number of processes if you like: it goes on. GPUs are
used where there are enough of them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import fastis

SUBSET = Path(__file__).resolve().parents[1] / "bench/data/fashion_mnist_subset.npz"


def load(path: str, part: str) -> TensorDataset:
    arrays = np.load(path, allow_pickle=False)
    images = torch.from_numpy(arrays[f"x_{part}"])[:, None].float() / 127.5 - 1
    return TensorDataset(images, torch.from_numpy(arrays[f"y_{part}"]).long())


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


@torch.no_grad()
def mean_loss(model: nn.Module, data: TensorDataset, device: torch.device) -> tuple[float, float]:
    """Mean loss and error rate over all of ``data``."""
    images, target = (tensor.to(device) for tensor in data.tensors)
    logits = torch.cat([model(part) for part in images.split(1000)])
    wrong = (logits.argmax(1) != target).float().mean()
    return float(nn.functional.cross_entropy(logits, target)), float(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default=str(SUBSET), help="uint8 arrays x_train, y_train, x_test")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--method", default="emais", help="scan: uniform")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpoint", default="", help="file to go on from, and to write")
    args = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpus = torch.cuda.device_count() >= ranks
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if on_gpus else "gloo")
    group, rank = (dist.group.WORLD, dist.get_rank()) if ranks > 1 else (None, 0)

    train, test = (load(args.data, part) for part in ("train", "test"))
    torch.manual_seed(args.seed)
    model = module = network().to(device)
    if ranks > 1:
        model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    sampler = fastis.Sampler(
        len(train),
        args.batch_size // ranks,  # of each process
        method=args.method,
        group=group,
        device=device,
        seed=args.seed,
    )
    loader = fastis.DataLoader(train, sampler, num_workers=args.workers, pin_memory=on_gpus)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=3.0)

    parts = {"model": module, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    epoch = 0
    if os.path.exists(args.checkpoint):  # the same file for all ranks
        epoch = fastis.load_checkpoint(args.checkpoint, **parts)["epoch"]
    while epoch < args.epochs:
        for batch, (x, y) in loader:
            batch = batch.to(device, non_blocking=True)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            out = fastis.cross_entropy(model(x), y, batch.weights)
            sampler.update(batch, out)  # before backward, which hides the exchange of the scores
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            scheduler.step()
        epoch += 1
        if rank == 0 and args.checkpoint:
            fastis.save_checkpoint(args.checkpoint, **parts, epoch=epoch)
    gain = float(sampler.variance.effective_batch_size) / sampler.global_batch_size
    if rank == 0:
        loss, (_, error) = mean_loss(module, train, device)[0], mean_loss(module, test, device)
        print(f"train loss {loss:.6f}, test error {100 * error:.2f} %, N_ems/B {gain:.3f}")
    if ranks > 1:
        dist.barrier()  # nobody leaves while another is still at work
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
