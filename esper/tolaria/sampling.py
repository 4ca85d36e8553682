"""An order of samples that a run can go on in, in the middle of an epoch.

    sampler = ResumableSampler(len(data), seed=0)
    loader = DataLoader(data, batch_size=32, sampler=sampler, num_workers=2)
    session = esper.session(..., stateful={"data": sampler}, resume=checkpoints.latest())
    for epoch in range(session.epoch, epochs):
        for batch in sampler.rest_of_epoch(loader):
            ...

The order follows from seed and epoch alone. What counts is what the loop was given, not what the
loader's workers have fetched ahead, so nothing is lost or seen twice, and nothing that was seen is
loaded again.
"""

from collections.abc import Iterator
from typing import TypeVar
from typing import cast

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Sampler

T = TypeVar("T")


class ResumableSampler(Sampler[int]):
    """Draws every sample once an epoch, in an order that depends on seed and epoch only.

    With a ``StatefulDataLoader`` of torchdata it needs no ``rest_of_epoch``: that loader keeps the
    place itself, and asks the sampler's iterators where they are.

    Args:
        num_samples: Number of samples of the data set; at least 1.
        seed: Seed of all orders; at least 0.
        shuffle: Whether to shuffle; else every epoch has the samples in their own order.

    Attributes:
        epoch: The epoch that is drawn, from 0.
        position: Samples of it that the loop was given.

    Raises:
        ValueError: If a number is too small.
    """

    def __init__(self, num_samples: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, but it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, but it must be at least 0")
        self.epoch = 0
        self.position = 0
        self._num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch."""
        self.epoch, self.position = epoch, 0

    def skip(self, num_samples: int) -> None:
        """Leaves out samples of the epoch, as if the loop had been given them."""
        self.position = min(self.position + num_samples, self._num_samples)

    def order(self) -> list[int]:
        """Returns the samples of the epoch in order."""
        if not self._shuffle:
            return list(range(self._num_samples))
        generator = torch.Generator().manual_seed(self._seed)
        # A seed of its own for each epoch, so that seed 1 in epoch 0 is not seed 0 in epoch 1.
        generator.manual_seed(int(torch.randint(2**62, (self.epoch + 1,), generator=generator)[-1]))
        order: list[int] = torch.randperm(self._num_samples, generator=generator).tolist()
        return order

    def __len__(self) -> int:
        """Samples of the epoch that are left."""
        return self._num_samples - self.position

    def __iter__(self) -> "SampleIterator":
        """Returns the samples of the epoch that are left."""
        return SampleIterator(self.order(), self.position)

    def rest_of_epoch(self, loader: DataLoader[T]) -> Iterator[T]:
        """Returns the batches of the epoch that are left; after the last one the next epoch begins.

        Args:
            loader: A loader with this sampler and a ``batch_size``; any number of workers.

        Raises:
            ValueError: If the loader has another sampler, or no ``batch_size``.
        """
        if loader.sampler is not self or loader.batch_size is None:
            raise ValueError("loader has another sampler or no batch_size, but it needs both")
        # Made at once: a loader draws from torch's global generator when it starts.
        return self._given(cast(Iterator[T], iter(loader)), loader.batch_size)

    def _given(self, batches: Iterator[T], batch_size: int) -> Iterator[T]:
        for batch in batches:
            self.skip(batch_size)
            yield batch
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, object]:
        """Returns the place in the data."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Goes to a place in the data."""
        self.epoch = cast(int, state_dict["epoch"])
        self.position = cast(int, state_dict["position"])


class SampleIterator(Iterator[int]):
    """What is left of an epoch, and how far it has been drawn."""

    def __init__(self, order: list[int], position: int) -> None:
        self._order = order
        self._position = position

    def __next__(self) -> int:
        """Returns the next sample."""
        if self._position >= len(self._order):
            raise StopIteration
        self._position += 1
        return self._order[self._position - 1]

    def state_dict(self) -> dict[str, object]:
        """Returns how far it has been drawn."""
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Goes to where another iterator of the same epoch was."""
        self._position = cast(int, state_dict["position"])
