"""Networks of the benchmarks, for images ``[B, C, H, W]`` (the LSTM: sequences ``[B, T, D]``); each
returns logits ``[B, classes]``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

ImageShape = tuple[int, int, int]


def lenet5(image_shape: ImageShape = (1, 28, 28), num_classes: int = 10) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 44,426 parameters at 28 x 28.

    The pooling comes before the ReLU: the values are the same and the ReLU has a quarter to do.
    """
    channels, height, width = image_shape
    features = 16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def mlp(image_shape: ImageShape = (1, 28, 28), num_classes: int = 10) -> nn.Module:
    """One hidden layer of 256 ReLU: 203,530 parameters at 28 x 28."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(image_shape), 256), nn.ReLU(), nn.Linear(256, num_classes)
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(image_shape: ImageShape = (3, 32, 32), num_classes: int = 10) -> nn.Module:
    """ResNet-18 for small images: a 3 x 3 stem and no max pooling; 11,173,962 parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    in_channels = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)]
        in_channels = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)]
    return nn.Sequential(*layers)


def cnn(
    image_shape: ImageShape = (1, 56, 56), num_classes: int = 10, batch_norm: bool = False
) -> nn.Module:
    """Four 3 x 3 convolutions of stride 2 and the mean over positions: it does not matter where
    in the image something lies. 60,874 parameters for one channel."""
    layers: list[nn.Module] = []
    in_channels = image_shape[0]
    for channels in (16, 32, 64, 64):
        layers.append(nn.Conv2d(in_channels, channels, 3, 2, 1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]
        in_channels = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)]
    return nn.Sequential(*layers)


class SequenceClassifier(nn.Module):
    """A linear classifier on the last hidden state of an LSTM, for ``[B, T, D]``."""

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.linear(hidden[0])


def lstm(sequence_shape: tuple[int, int] = (784, 1), num_classes: int = 10) -> nn.Module:
    """An LSTM of 128 units (Katharopoulos & Fleuret 2018, section 4.4)."""
    return SequenceClassifier(sequence_shape[-1], 128, num_classes)


MODELS: dict[str, Callable[[ImageShape, int], nn.Module]] = {
    "lenet5": lenet5,
    "mlp": mlp,
    "resnet18": resnet18,
    "cnn": cnn,
    "cnn_bn": partial(cnn, batch_norm=True),
    "lstm": lstm,
}


def build_model(name: str, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """The network ``name`` of MODELS, its convolutions channels-last: a third faster on the CPU."""
    model = MODELS[name](image_shape, num_classes)
    return model.to(memory_format=torch.channels_last)
