"""CIFAR-10 and CIFAR-100 from a local folder of the standard binary files.

The format is that of https://www.cs.toronto.edu/~kriz/cifar.html, "binary version": records of one
label byte (CIFAR-10), or of a coarse and a fine label byte (CIFAR-100), followed by 3072 bytes, the
red, green and blue planes of 32 x 32 pixels.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch import nn

from esper.tolaria.tasks.conv import ConvBlock
from esper.tolaria.tasks.task import Split
from esper.tolaria.tasks.task import Task

_PIXELS = 3 * 32 * 32
VALIDATION_SHARE = 0.1
SPLIT_SEED = 20_240_229


@dataclass(frozen=True, slots=True)
class _Format:
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    num_classes: int


_FORMATS = {
    "cifar10": _Format(
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 1, 10
    ),
    "cifar100": _Format(("train.bin",), ("test.bin",), 2, 100),
}


class CifarCNN(nn.Module):
    """Three stages of two blocks each, with half the resolution and twice the channels each time.

    Args:
        hidden: Hidden channels of each block.
        num_classes: Number of classes.
        channels: Channels of the first stage.
    """

    def __init__(self, hidden: int = 8, *, num_classes: int = 10, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in range(3):
            outputs = channels * 2**stage
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=1 + (stage > 0), padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                ConvBlock(outputs, hidden),
                ConvBlock(outputs, hidden),
            ]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns class scores, [samples, classes], for images [samples, 3, 32, 32]."""
        scores: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return scores


def cifar(name: str, folder: Path) -> Task:
    """Loads a data set; a tenth of its training images is held out.

    Args:
        name: ``cifar10`` or ``cifar100`` (fine labels).
        folder: Folder of the binary files.

    Raises:
        ValueError: If a file does not hold whole records or has a label out of range.
        OSError: If a file cannot be read.
    """
    form = _FORMATS[name]
    images, labels = _read(folder, form.train, form)
    test_images, test_labels = _read(folder, form.test, form)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, train = order.tensor_split([max(1, round(VALIDATION_SHARE * len(labels)))])
    axes = (0, 2, 3)
    mean = images[train].mean(axes, keepdim=True)
    deviation = images[train].std(axes, keepdim=True).clamp_min(1e-6)
    images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
    return Task(
        name=name,
        train=Split(images[train], labels[train]),
        validation=Split(images[held_out], labels[held_out]),
        test=Split(test_images, test_labels),
        host_size=8,
        batch_size=128,
        _build_host=partial(CifarCNN, num_classes=form.num_classes),
    )


def _read(folder: Path, files: tuple[str, ...], form: _Format) -> tuple[Tensor, Tensor]:
    """Returns images in [0, 1], float32 [samples, 3, 32, 32], and labels, int64 [samples]."""
    record = form.label_bytes + _PIXELS
    parts = []
    for name in files:
        data = np.fromfile(folder / name, dtype=np.uint8)
        if len(data) == 0 or len(data) % record:
            raise ValueError(
                f"{folder / name} has {len(data)} bytes, but it must hold whole records of {record}"
            )
        parts.append(data.reshape(-1, record))
    records = np.concatenate(parts)
    labels = torch.from_numpy(records[:, form.label_bytes - 1].astype(np.int64))
    if int(labels.max()) >= form.num_classes:
        raise ValueError(
            f"{folder} has the label {int(labels.max())}, but it must be below {form.num_classes}"
        )
    images = torch.from_numpy(records[:, form.label_bytes :].astype(np.float32)) / 255.0
    return images.reshape(-1, 3, 32, 32), labels
