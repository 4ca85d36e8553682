"""A plain training loop with a growth session in it, for those who do not bring their own."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.optim import Optimizer

from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.link import Address
from esper.tolaria.session import Mode
from esper.tolaria.session import Session


def train_epoch(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[Batch], loss: SampleLoss
) -> float:
    """Trains for one epoch.

    Args:
        model: Plain or wrapped model; put into training mode.
        optimizer: Stepped once per batch.
        batches: Training batches.
        loss: Per-sample loss; its mean is minimised.

    Returns:
        Mean training loss over the samples.

    Raises:
        ValueError: If there is no batch.
    """
    model.train()
    total, num_samples = 0.0, 0
    for batch in batches:
        losses = loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()
        total += float(losses.detach().sum())
        num_samples += len(losses)
    if num_samples == 0:
        raise ValueError("train has 0 samples, but an epoch needs at least 1")
    return total / num_samples


class Trainer:
    """Trains a wrapped model and grows it.

    Args:
        model: The wrapped model.
        optimizer: Optimizer over its parameters.
        train: Training batches of an epoch, by the epoch's number, or batches that every epoch
            iterates anew (a DataLoader).
        held_out: Held-out batches, never trained on.
        loss: Maps (model, batch) to per-sample losses, shape [samples].
        epochs: Number of epochs; at least 1.
        plane: Address of a plane, or ``None`` to start an embedded one.
        mode: ``async`` or ``lockstep``, see ``Session``.
        config: Growth configuration; ``None`` means the defaults.
        on_epoch: Called with every epoch's record, for progress bars and logs.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        *,
        train: Callable[[int], Iterable[Batch]] | Collection[Batch],
        held_out: Collection[Batch],
        loss: SampleLoss,
        epochs: int,
        plane: Address | None = None,
        mode: Mode = "async",
        config: EsperConfig | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._train = train
        self._loss = loss
        self._epochs = epochs
        self._on_epoch = on_epoch
        self._open_session = partial(
            Session,
            model,
            optimizer,
            epochs=epochs,
            held_out=held_out,
            loss=loss,
            plane=plane,
            mode=mode,
            config=config,
        )

    def fit(self) -> History:
        """Opens a session, runs all epochs and closes it.

        Returns:
            The run's history.

        Raises:
            ValueError: If an argument breaks its rule, see ``Session``; nothing was trained then.
        """
        with self._open_session() as session:
            for epoch in range(self._epochs):
                batches = self._train(epoch) if callable(self._train) else self._train
                train_loss = train_epoch(self.model, self.optimizer, batches, self._loss)
                record = session.epoch_end(train_loss=train_loss)
                if self._on_epoch is not None:
                    self._on_epoch(record)
        return session.history
