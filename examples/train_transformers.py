"""Hugging Face's Trainer with importance sampling: a text classifier, from scratch.

    python examples/train_transformers.py [--epochs 6] [--folder runs] [--resume]

Needs transformers and accelerate; the texts are made up, and nothing is downloaded. Stop it and
start it again with --resume: it goes on where the last checkpoint in the folder was written, in
the middle of an epoch too. Seconds on two cores.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    TrainingArguments,
)

from fastis.integrations.transformers import Trainer

TOPICS, WORDS, LENGTH = 4, 60, 16


class Texts(Dataset):
    """Texts on one of four topics: each has ten words, and a text has three or eight of these."""

    def __init__(self, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(TOPICS, (num_samples,), generator=generator)
        self.words = torch.randint(WORDS, (num_samples, LENGTH), generator=generator)
        on_topic = self.labels[:, None] * 10 + torch.randint(
            10, (num_samples, LENGTH), generator=generator
        )
        count = torch.where(torch.rand(num_samples, generator=generator) < 0.2, 3, 8)
        places = torch.rand(num_samples, LENGTH, generator=generator).argsort(1)
        self.words = torch.where(places < count[:, None], on_topic, self.words)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    right = prediction.predictions.argmax(1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", default="runs")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=TOPICS,
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            args.folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=250,
            gradient_accumulation_steps=2,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            logging_steps=64,
            eval_strategy="epoch",
            save_steps=50,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=args.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Texts(args.samples, seed=1),
        eval_dataset=Texts(1000, seed=2),
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    print(trainer.sampler.prediction())


if __name__ == "__main__":
    main()
