"""Handwritten digits of scikit-learn: 1797 images of 8 x 8 pixels, 10 classes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch import nn

from esper.tolaria.tasks.conv import ConvBlock
from esper.tolaria.tasks.task import Split
from esper.tolaria.tasks.task import Task

SPLIT_SEED = 20_240_229
"""Fixes which digits are in which split of the named tasks, whatever the seed of a run is."""


class DigitsMLP(nn.Module):
    """A multilayer perceptron with one hidden layer, for images of 8 x 8 pixels.

    Args:
        hidden: Width of the hidden layer.
    """

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Returns class scores, shape [samples, 10], for images of shape [samples, 8, 8]."""
        scores: Tensor = self.net(images.flatten(1))
        return scores


class DigitsCNN(nn.Module):
    """A convolutional network: a stem, two blocks, each followed by pooling, and a linear head.

    Args:
        hidden: Hidden channels of each block.
        channels: Channels between the blocks.
    """

    def __init__(self, hidden: int = 4, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU())
        self.blocks = nn.ModuleList(ConvBlock(channels, hidden) for _ in range(2))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(channels * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns class scores, shape [samples, 10], for images of shape [samples, 8, 8]."""
        hidden = self.stem(images.unsqueeze(1))
        for block in self.blocks:
            hidden = self.pool(block(hidden))
        scores: Tensor = self.head(hidden.flatten(1))
        return scores


def digits(split_seed: int = SPLIT_SEED) -> Task:
    """The digits with a multilayer perceptron.

    Args:
        split_seed: Says which digits are in which split. A fifth of the digits is a small sample:
            what is to hold for digits at large is measured over several splits.
    """
    return _task("digits", DigitsMLP, 8, split_seed)


def digits_cnn(split_seed: int = SPLIT_SEED) -> Task:
    """The digits with a convolutional network; split as ``digits``."""
    return _task("digits-cnn", DigitsCNN, 4, split_seed)


def _task(
    name: str, build_host: Callable[[int], nn.Module], host_size: int, split_seed: int
) -> Task:
    """Returns the digits, split 60 / 20 / 20 by class."""
    # Imported late: scikit-learn takes longer to import than the whole of Esper.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32) / 16.0
    labels = torch.from_numpy(data.target).to(torch.int64)
    everything = range(len(labels))
    train, rest = train_test_split(
        everything, train_size=0.6, stratify=labels, random_state=split_seed
    )
    validation, test = train_test_split(
        rest, train_size=0.5, stratify=labels[rest], random_state=split_seed
    )
    return Task(
        name=name,
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(images[test], labels[test]),
        host_size=host_size,
        batch_size=64,
        _build_host=build_host,
    )
