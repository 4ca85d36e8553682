"""Named tasks: data, split and host of the experiments that Esper ships.

A task is everything that must be equal for two models to be compared: the data, how it is split,
and how a host of a given size is built. The test split is for the final number and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from esper.kasmina.modes import evaluating

LabelledBatch = tuple[Tensor, Tensor]
"""Inputs, shape [samples, ...], and class numbers, shape [samples]."""

DIGITS_SPLIT_SEED = 20_240_229
"""Fixes which digits are in which split, whatever the seed of a run is."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
        inputs: Features, shape [samples, ...].
        targets: Class numbers, shape [samples], int64.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, batch_size: int) -> list[LabelledBatch]:
        """Returns the samples in their order; the last batch may be smaller."""
        return list(zip(self.inputs.split(batch_size), self.targets.split(batch_size), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A data set, its split and its hosts.

    Attributes:
        name: The name that it is registered under.
        train: What models learn from.
        validation: Held-out data of the accept test, and for choosing anything.
        test: Read once per finished model.
        host_size: Size of the host that growth starts from.
        batch_size: Samples per batch.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    host_size: int
    batch_size: int
    _build_host: Callable[[int], nn.Module]

    def host(self, seed: int = 0, size: int | None = None) -> nn.Module:
        """Returns a new host; equal arguments give equal weights.

        The global random state is left as it was.

        Args:
            seed: Seed of the initial weights.
            size: Width of the hidden layer; ``None`` means ``host_size``.

        Raises:
            ValueError: If ``size`` is below 1.
        """
        size = self.host_size if size is None else size
        if size < 1:
            raise ValueError(f"size is {size}, but a host needs at least 1 hidden feature")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build_host(size)

    def train_batches(self, seed: int, epoch: int) -> list[LabelledBatch]:
        """Returns the training batches of an epoch, shuffled by (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        return Split(self.train.inputs[order], self.train.targets[order]).batches(self.batch_size)

    def held_out_batches(self) -> list[LabelledBatch]:
        """Returns the validation batches, always in the same order."""
        return self.validation.batches(self.batch_size)

    def loss(self, model: nn.Module, batch: object) -> Tensor:
        """Returns the cross-entropy of every sample, shape [samples].

        Args:
            model: Maps inputs to class scores, shape [samples, classes].
            batch: A ``LabelledBatch``.
        """
        inputs, targets = cast(LabelledBatch, batch)
        return functional.cross_entropy(model(inputs), targets, reduction="none")

    def accuracy(self, model: nn.Module, split: Split) -> float:
        """Returns the share of samples whose highest class score is the right one.

        Runs in eval mode without gradients, in batches of ``batch_size``; the training mode of
        every module is restored. The result depends on the model and the split alone.

        Args:
            model: Maps inputs to class scores, shape [samples, classes].
            split: The samples; at least one.
        """
        correct = 0
        with evaluating(model):
            for inputs, targets in split.batches(self.batch_size):
                correct += int((model(inputs).argmax(dim=-1) == targets).sum())
        return correct / len(split)


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


def _digits() -> Task:
    """Handwritten digits of scikit-learn (1797 images, 10 classes), split 60 / 20 / 20 by class."""
    # Imported late: scikit-learn takes longer to import than the whole of Esper.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32) / 16.0
    labels = torch.from_numpy(data.target).to(torch.int64)
    everything = range(len(labels))
    train, rest = train_test_split(
        everything, train_size=0.6, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    validation, test = train_test_split(
        rest, train_size=0.5, stratify=labels[rest], random_state=DIGITS_SPLIT_SEED
    )
    return Task(
        name="digits",
        train=Split(images[train], labels[train]),
        validation=Split(images[validation], labels[validation]),
        test=Split(images[test], labels[test]),
        host_size=8,
        batch_size=64,
        _build_host=DigitsMLP,
    )


_TASKS: dict[str, Callable[[], Task]] = {"digits": _digits}


def names() -> tuple[str, ...]:
    """Returns the names of all tasks."""
    return tuple(_TASKS)


@cache
def get(name: str) -> Task:
    """Returns a task by name; its data is loaded once per process.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in _TASKS:
        raise ValueError(f"task is {name!r}, but it must be one of {', '.join(_TASKS)}")
    return _TASKS[name]()
