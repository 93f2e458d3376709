"""A Lightning module trained by importance sampling: workers, checkpoints, resuming, a log.

    python examples/train_lightning.py [--epochs 8] [--workers 2] [--folder runs]

The module differs from any other in its loader and its loss; the callback does the rest. Stopped at
any moment and started again with the same --folder, it goes on from the last checkpoint, in the
middle of an epoch too. Seconds on two cores; runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastis
from fastis.integrations.lightning import ImportanceSampling


def blobs(num_samples: int, seed: int) -> TensorDataset:
    """Points around one of four centres; few of them are near to another one."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (num_samples,), generator=generator)
    noise = torch.rand(num_samples, 1, generator=generator).pow(4) * 4
    x = torch.randn(num_samples, 16, generator=generator) * (0.3 + noise)
    x[torch.arange(num_samples), 4 * y] += 2
    return TensorDataset(x, y)


class Classifier(lightning.LightningModule):
    def __init__(self, num_samples: int, workers: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def train_dataloader(self) -> fastis.DataLoader:
        data = blobs(self.hparams.num_samples, seed=1)
        # The sampler lives with the module, so that it has no scores to bring to the host.
        sampler = fastis.Sampler(len(data), batch_size=64, device=self.device)
        workers = self.hparams.workers
        return fastis.DataLoader(data, sampler, num_workers=workers, persistent_workers=workers > 0)

    def training_step(
        self, minibatch: tuple[fastis.Batch, list[Tensor]], batch_idx: int
    ) -> fastis.ScoredLoss:
        batch, (x, y) = minibatch
        out = fastis.cross_entropy(self.network(x), y, batch.weights)
        self.log("train_loss", out.loss)
        return out

    def val_dataloader(self) -> DataLoader:
        return DataLoader(blobs(1000, seed=2), batch_size=500)

    def validation_step(self, minibatch: list[Tensor], batch_idx: int) -> None:
        x, y = minibatch
        wrong = self.network(x).argmax(1) != y
        self.log("error", 100 * wrong.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", default="", help="of checkpoints, to go on from, and of the log"
    )
    args = parser.parse_args()
    lightning.seed_everything(0)
    folder = Path(args.folder or tempfile.mkdtemp())
    sampling = ImportanceSampling(adjust_lr={"max_factor": 3.0}, log_every_n_steps=20)
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=50)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        callbacks=[sampling, save, LearningRateMonitor("step")],
        logger=CSVLogger(folder),
        log_every_n_steps=20,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    module = Classifier(args.samples, args.workers)
    trainer.fit(module, ckpt_path=last if last.exists() else None)
    print(f"step {trainer.global_step}: test error {trainer.callback_metrics['error']:.1f} %")
    print(sampling.sampler.prediction())


if __name__ == "__main__":
    main()
