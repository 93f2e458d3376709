"""Data sets as four tensors: images float32 ``[N, C, H, W]`` in [-1, 1], and labels int64 ``[N]``.

``fashion_mnist`` is the embedded subset, or the whole set from a file with the same keys (uint8
``x_train [N, 28, 28]``, ``y_train [N]``, ``x_test``, ``y_test``). ``cifar10`` is a file of JPEG
bytes: ``jpeg_train`` (all files end to end), ``offsets_train [N+1]``, ``y_train [N]``, the same for
test, and ``class_names``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz"
PARTS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """Normalised training and test set; ``augment`` maps a training batch to a randomised one."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.x_train.shape[1:])

    def to(self, device: torch.device | str) -> Dataset:
        tensors = [t.to(device) for t in (self.x_train, self.y_train, self.x_test, self.y_test)]
        return Dataset(self.name, *tensors, self.num_classes, self.augment)


def load_dataset(name: str = "fashion_mnist", data: str | Path | None = None) -> Dataset:
    """Loads a data set by name.

    Parameters
    ----------
    name : str
        "fashion_mnist" or "cifar10".
    data : path, optional
        the .npz file; by default what the environment variable FASTIS_DATA names, else the subset
        of Fashion-MNIST in bench/data.

    Raises
    ------
    ValueError
        for an unknown name, or a file without the expected arrays.
    FileNotFoundError
        when the file is not there.
    """
    if name not in LOADERS:
        raise ValueError(f"--dataset must be one of {', '.join(LOADERS)}, got {name!r}")
    source = "--data" if data else "FASTIS_DATA"
    data = data or os.environ.get("FASTIS_DATA")
    if not data and name != "fashion_mnist":
        raise ValueError(f"--dataset {name} needs --data FILE.npz (or FASTIS_DATA), got neither")
    path = Path(data or EMBEDDED)
    if not path.is_file():
        raise FileNotFoundError(f"{source} must name an .npz file, got {str(path)!r}: no such file")
    try:
        # No bare arrays and no pickles: an .npz is a zip of plain arrays.
        file = np.load(path, allow_pickle=False)
        arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{source} must name an .npz file, got {str(path)!r}: {error}") from error
    return LOADERS[name](arrays, source)


def data_name(data: str | Path | None) -> str:
    """What a result row calls the data: the file's name, or "embedded"."""
    data = data or os.environ.get("FASTIS_DATA")
    return Path(data).name if data else "embedded"


def _load_fashion_mnist(arrays: dict[str, np.ndarray], source: str) -> Dataset:
    _require(arrays, ("x_train", "y_train", "x_test", "y_test"), source)
    for part in PARTS:
        images = arrays[f"x_{part}"]
        if images.dtype != np.uint8 or images.ndim != 3 or not len(images):
            raise ValueError(
                f"{source}: x_{part} must be uint8 [N, H, W] with N > 0, "
                f"got {images.dtype} {list(images.shape)}"
            )
        _check_labels(arrays[f"y_{part}"], len(images), f"{source}: y_{part}")
    images = {part: arrays[f"x_{part}"][:, None] for part in PARTS}
    return _assemble("fashion_mnist", images, arrays, augment=None)


def _load_cifar10(arrays: dict[str, np.ndarray], source: str) -> Dataset:
    keys = [f"{kind}_{part}" for kind in ("jpeg", "offsets", "y") for part in PARTS]
    _require(arrays, [*keys, "class_names"], source)
    images = {}
    for part in PARTS:
        stream, offsets = arrays[f"jpeg_{part}"], arrays[f"offsets_{part}"]
        if stream.dtype != np.uint8 or stream.ndim != 1 or offsets[-1] != len(stream):
            raise ValueError(
                f"{source}: jpeg_{part} must be uint8 bytes, as many as the last offset says "
                f"({offsets[-1]}), got {stream.dtype} {list(stream.shape)}"
            )
        _check_labels(arrays[f"y_{part}"], len(offsets) - 1, f"{source}: y_{part}")
        images[part] = _decode_jpegs(stream, offsets, f"cifar10 {part}")
    return _assemble("cifar10", images, arrays, augment=random_crop_flip)


LOADERS = {"fashion_mnist": _load_fashion_mnist, "cifar10": _load_cifar10}


def _require(arrays: dict[str, np.ndarray], keys: list[str] | tuple[str, ...], source: str) -> None:
    absent = [key for key in keys if key not in arrays]
    if absent:
        raise ValueError(
            f"{source} must hold the arrays {', '.join(keys)}; "
            f"{', '.join(absent)} missing, got {', '.join(arrays) or 'none'}"
        )


def _check_labels(labels: np.ndarray, length: int, what: str) -> None:
    if labels.shape != (length,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"{what} must be {length} integers from 0, got {labels.dtype} {list(labels.shape)}"
        )


def _decode_jpegs(stream: np.ndarray, offsets: np.ndarray, label: str) -> np.ndarray:
    """uint8 ``[N, 3, H, W]`` of ``N`` JPEG files that lie end to end in ``stream``."""
    from PIL import Image

    data = stream.tobytes()
    decoded = [
        np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))
        for start, stop in tqdm(
            pairwise(offsets), label, total=len(offsets) - 1, unit=" images", leave=False
        )
    ]
    return np.stack(decoded).transpose(0, 3, 1, 2)


def _assemble(
    name: str,
    images: dict[str, np.ndarray],
    arrays: dict[str, np.ndarray],
    augment: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Dataset:
    """Brings the pixels of both parts to [-1, 1]."""
    train, test = (torch.from_numpy(np.ascontiguousarray(images[part])).float() for part in PARTS)
    labels = [torch.from_numpy(arrays[f"y_{part}"].astype(np.int64)) for part in PARTS]
    return Dataset(
        name=name,
        x_train=train.div_(127.5).sub_(1),
        y_train=labels[0],
        x_test=test.div_(127.5).sub_(1),
        y_test=labels[1],
        num_classes=int(labels[0].max()) + 1,
        augment=augment,
    )


def random_crop_flip(images: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Random crop after padding with zeros (grey) and a horizontal flip of every second
    image, in torch ops on the whole batch and from torch's default generator.

    Parameters
    ----------
    images : Tensor ``[B, C, H, W]``

    Returns
    -------
    Tensor ``[B, C, H, W]``
    """
    batch, _, height, width = images.shape
    device = images.device
    dy, dx = torch.randint(2 * padding + 1, (2, batch, 1), device=device)
    flip = torch.rand(batch, 1, device=device) < 0.5
    columns = torch.arange(width, device=device)
    rows = torch.arange(height, device=device) + dy
    columns = torch.where(flip, columns.flip(0), columns) + dx
    which = torch.arange(batch, device=device)
    padded = F.pad(images, (padding,) * 4)
    # The indices surround the channel slice, so torch puts the channels last: [B, H, W, C].
    cropped = padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
