"""What a task is: everything that must be equal for two models to be compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

from esper.kasmina.modes import evaluating

LabelledBatch = tuple[Tensor, Tensor]
"""Inputs, shape [samples, ...], and class numbers, shape [samples] or [samples, positions]."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
        inputs: Features, shape [samples, ...].
        targets: Class numbers, int64; one a sample, shape [samples], or one for every position of
            it, shape [samples, positions].
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

    The test split is for the final number and nothing else.

    Attributes:
        name: The name that it is registered under.
        train: What models learn from.
        validation: Held-out data of the accept test, and for choosing anything.
        test: Read once per finished model.
        host_size: Size of the host that growth starts from.
        batch_size: Samples per batch.
        epoch_samples: Training samples of one epoch, drawn anew without repetition for each;
            ``None`` means all of them.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    host_size: int
    batch_size: int
    _build_host: Callable[[int], nn.Module]
    epoch_samples: int | None = None

    def host(self, seed: int = 0, size: int | None = None) -> nn.Module:
        """Returns a new host; equal arguments give equal weights.

        The global random state is left as it was.

        Args:
            seed: Seed of the initial weights.
            size: Width of what growth widens; ``None`` means ``host_size``.

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
        order = torch.randperm(len(self.train), generator=generator)[: self.epoch_samples]
        return Split(self.train.inputs[order], self.train.targets[order]).batches(self.batch_size)

    def held_out_batches(self) -> list[LabelledBatch]:
        """Returns the validation batches, always in the same order."""
        return self.validation.batches(self.batch_size)

    def loss(self, model: nn.Module, batch: object) -> Tensor:
        """Returns the mean cross-entropy of every sample's targets in nats, shape [samples].

        Args:
            model: Maps inputs to class scores, shape [samples, ..., classes].
            batch: A ``LabelledBatch``.
        """
        inputs, targets = cast(LabelledBatch, batch)
        scores = model(inputs).movedim(-1, 1)
        losses = functional.cross_entropy(scores, targets, reduction="none")
        return losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses

    def accuracy(self, model: nn.Module, split: Split) -> float:
        """Returns the share of targets that have the highest class score.

        Runs in eval mode without gradients, in batches of ``batch_size``; the training mode of
        every module is restored. The result depends on the model and the split alone.

        Args:
            model: Maps inputs to class scores, shape [samples, ..., classes].
            split: The samples; at least one.
        """
        correct = 0
        with evaluating(model):
            for inputs, targets in split.batches(self.batch_size):
                correct += int((model(inputs).argmax(dim=-1) == targets).sum())
        return correct / split.targets.numel()

    def mean_loss(self, model: nn.Module, split: Split) -> float:
        """Returns the mean loss over a split in nats, in eval mode like ``accuracy``."""
        total = 0.0
        with evaluating(model):
            for batch in split.batches(self.batch_size):
                total += float(self.loss(model, batch).double().sum())
        return total / len(split)
