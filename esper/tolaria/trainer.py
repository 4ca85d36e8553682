"""A plain training loop with a growth session in it, for those who do not bring their own."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from os import PathLike
from typing import cast

from torch import Tensor
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tolaria import randomness
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.link import Address
from esper.tolaria.mode import Mode
from esper.tolaria.randomness import RandomState
from esper.tolaria.sampling import ResumableSampler
from esper.tolaria.session import Session
from esper.tolaria.state import Stateful


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    loss: SampleLoss,
    before_step: Callable[[Tensor], None] = lambda losses: None,
) -> tuple[float, int]:
    """Takes one optimizer step on a batch's mean loss.

    Args:
        model: The model.
        optimizer: Steps once.
        batch: The batch.
        loss: Per-sample loss.
        before_step: Is told the samples' losses before the optimizer steps.

    Returns:
        Sum of the samples' losses before the step, and their number.
    """
    losses = loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    before_step(losses.detach())
    optimizer.step()
    return float(losses.detach().sum()), len(losses)


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
    position = _Position(lambda: batches)
    for batch in position:
        train_step(model, optimizer, batch, loss, position.add)
    return position.mean_loss()


class _Position:
    """Where in an epoch the loop is, and what the epoch's loss is so far.

    A loader with a ``ResumableSampler`` is told where to go on. Other batches are not numbered by
    the data but by the loop: it goes on by drawing the epoch's batches anew, from the random state
    that the epoch began with, and skipping those that it has seen.

    Args:
        batches: Returns the batches of the epoch that is running.

    Attributes:
        epoch: The epoch that is running, from 0.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._batches = batches
        self.epoch = 0
        self.reset()

    def reset(self) -> None:
        self.num_batches = 0
        self._total, self._num_samples = 0.0, 0
        self._random: RandomState | None = None  # when the epoch began; None before

    def add(self, losses: Tensor) -> None:
        self._total += float(losses.sum())
        self._num_samples += len(losses)

    def mean_loss(self) -> float:
        if self._num_samples == 0:
            raise ValueError("train has 0 samples, but an epoch needs at least 1")
        return self._total / self._num_samples

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the epoch that are left."""
        now = randomness.capture()
        begun = self._random is not None
        if self._random is None:
            self._random = now
        randomness.restore(self._random)
        source = self._batches()
        if isinstance(source, DataLoader) and isinstance(source.sampler, ResumableSampler):
            source.sampler.set_epoch(self.epoch)
            source.sampler.skip(self.num_batches * (source.batch_size or 1))
            rest = source.sampler.rest_of_epoch(source)
        else:
            rest = iter(source)
            next(islice(rest, self.num_batches, self.num_batches), None)
        if begun:
            randomness.restore(now)
        for batch in rest:
            self.num_batches += 1
            yield batch

    def state_dict(self) -> dict[str, object]:
        return {
            "num_batches": self.num_batches,
            "total": self._total,
            "num_samples": self._num_samples,
            "random": None if self._random is None else asdict(self._random),
        }

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.num_batches = cast(int, state_dict["num_batches"])
        self._total = cast(float, state_dict["total"])
        self._num_samples = cast(int, state_dict["num_samples"])
        random = cast(dict[str, object] | None, state_dict["random"])
        self._random = None if random is None else RandomState(**random)  # type: ignore[arg-type]


class Trainer:
    """Trains a wrapped model and grows it.

    Args:
        model: The wrapped model.
        optimizer: Optimizer over its parameters.
        train: Training batches of an epoch, by the epoch's number, or batches that every epoch
            iterates anew (a DataLoader). With a ``ResumableSampler`` a run that goes on within an
            epoch loads nothing twice.
        held_out: Held-out batches, never trained on.
        loss: Maps (model, batch) to per-sample losses, shape [samples].
        epochs: Number of epochs; at least 1.
        plane: Address of a plane, or ``None`` to start an embedded one.
        mode: ``async``, ``lockstep`` or ``replay``, see ``Session``.
        replay: The run to replay, see ``Session``.
        config: Growth configuration; ``None`` means the defaults.
        parallel: What is called in the model's place to train it, such as the
            ``DistributedDataParallel`` around it; ``None`` means the model itself. ``train`` then
            gives this process's part of each batch.
        on_epoch: Called with every epoch's record, for schedulers, progress bars and logs.
        stateful: What else the training consists of, see ``Session``; not the data's position,
            which the trainer keeps itself.
        checkpoints: Where a checkpoint is written at the end of every epoch.
        save_every_steps: Every how many optimizer steps a checkpoint is written besides.
        resume: Whether to go on from the newest sound checkpoint, if there is one. The batches of
            an epoch must then follow from its number and the global random state alone.

    Raises:
        ValueError: If checkpoints are asked for without a place for them.
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
        parallel: nn.Module | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        checkpoints: Checkpoints | None = None,
        save_every_steps: int | None = None,
        resume: bool = False,
        replay: str | PathLike[str] | None = None,
    ) -> None:
        if checkpoints is None and (resume or save_every_steps is not None):
            raise ValueError("checkpoints is None, but resume and save_every_steps need a place")
        if save_every_steps is not None and save_every_steps < 1:
            raise ValueError(f"save_every_steps is {save_every_steps}, but it must be at least 1")
        self.model = model
        self.optimizer = optimizer
        self._parallel = model if parallel is None else parallel
        self._train = train
        self._loss = loss
        self._epochs = epochs
        self._on_epoch = on_epoch
        self._checkpoints = checkpoints
        self._save_every_steps = save_every_steps
        self._resume = resume
        self._position = _Position(self._batches)
        self.num_samples = 0
        """Samples that ``fit`` has trained on in this epoch."""
        self.session: Session | None = None
        """The open session while ``fit`` runs, the last one after it, and ``None`` before."""
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
            replay=replay,
            stateful={**(stateful or {}), "position": self._position},
        )

    def fit(self) -> History:
        """Opens a session, runs all epochs and closes it.

        Returns:
            The run's history.

        Raises:
            ValueError: If an argument breaks its rule, see ``Session``; nothing was trained then.
        """
        resume = self._checkpoints.latest() if self._checkpoints and self._resume else None
        with self._open_session(resume=resume) as session:
            self.session = session
            for _ in range(session.epoch, self._epochs):
                train_loss = self._train_epoch(session)
                record = session.epoch_end(train_loss=train_loss)
                self._position.reset()
                if self._on_epoch is not None:
                    self._on_epoch(record)
                self._save(session)
        return session.history

    def _train_epoch(self, session: Session) -> float:
        self.model.train()
        position = self._position
        self.num_samples = 0
        position.epoch = session.epoch

        def before_step(losses: Tensor) -> None:
            position.add(losses)
            session.note_loss(losses.mean())

        for batch in session.batches(position):
            _, num_samples = train_step(
                self._parallel, self.optimizer, batch, self._loss, before_step
            )
            self.num_samples += num_samples
            if self._save_every_steps and session.step % self._save_every_steps == 0:
                self._save(session)
        return position.mean_loss()

    def _batches(self) -> Iterable[Batch]:
        assert self.session is not None, "batches are drawn inside of fit"
        return self._train(self.session.epoch) if callable(self._train) else self._train

    def _save(self, session: Session) -> None:
        if self._checkpoints is not None:
            session.save(self._checkpoints.path(session.step))
            self._checkpoints.prune()
