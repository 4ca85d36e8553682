"""The growth session: what a user adds to their own training loop.

    session = esper.session(model, optimizer, epochs=30, held_out=val_batches, loss=loss)
    for epoch in range(30):
        ...                                  # the user's own loop, unchanged
        session.epoch_end(train_loss=mean_loss)
    session.close()

The session hangs on ``optimizer.step()`` by torch's own post-step hook and on nothing else. It
never draws from the global random state, never changes a gradient of the host, and with growth
off (or a dead plane) the run is the run that plain torch would have made.

The loop may accumulate gradients, clip them over ``model.parameters()``, step by closures, give up
a batch after its backward, and have several optimizers and any scheduler: the gradients of newborn
seeds are kept apart from the host's (see ``esper.tolaria.gradients``). A ``torch.amp.GradScaler``
has to be told to the session, so that newborns are unscaled and checked for overflow too.

Where ``torch.distributed`` is initialised, every process opens its session, and together they are
one run (see ``esper.tolaria.agreement``): all of them call ``epoch_end`` and ``save``; the first
talks to the plane and writes the files. ``DistributedDataParallel`` or ``fully_shard`` goes on
caring for the host; what grows is whole in every process, and its gradients are averaged here.
"""

import atexit
import contextlib
import logging
import weakref
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import TypeVar

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.kasmina import Transition
from esper.tolaria import agreement
from esper.tolaria.asking import observe
from esper.tolaria.asking import signatures
from esper.tolaria.attribution import attribution as measure_attribution
from esper.tolaria.batches import draw
from esper.tolaria.checkpoint import Checkpoint
from esper.tolaria.checkpoint import read_checkpoint
from esper.tolaria.checkpoint import write_checkpoint
from esper.tolaria.chronicle import Chronicle
from esper.tolaria.chronicle import Clock
from esper.tolaria.cost import TrainingCost
from esper.tolaria.decisions import Decisions
from esper.tolaria.evaluation import Batch
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.evaluation import sample_losses
from esper.tolaria.governor import Governor
from esper.tolaria.governor import Run
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.history import SeedAttribution
from esper.tolaria.link import Address
from esper.tolaria.link import Advice
from esper.tolaria.link import PlaneLink
from esper.tolaria.link import check_candidates
from esper.tolaria.link import check_plane
from esper.tolaria.mode import Mode
from esper.tolaria.mode import check_run
from esper.tolaria.optimizers import check_all
from esper.tolaria.protocol import GraftProtocol
from esper.tolaria.ranks import Ranks
from esper.tolaria.replay import ReplayLink
from esper.tolaria.replay import SilentLink
from esper.tolaria.state import AdviceState
from esper.tolaria.state import RunRecord
from esper.tolaria.state import Stateful
from esper.tolaria.state import TrainingParts
from esper.tolaria.state import TrainingState
from esper.tolaria.trials import Trials
from esper.tolaria.watch import Watch

_log = logging.getLogger("esper")

T = TypeVar("T")


class Session:
    """Grows one model while the user trains it. Use as a context manager or call ``close``.

    A session that is still open when the interpreter ends is closed then.

    Args:
        model: The wrapped model.
        optimizer: The user's optimizer over the model's parameters, or all of them; the steps of
            the first one are the run's steps.
        epochs: Number of epochs that the run is planned for.
        held_out: Batches that are never trained on and never tested on; iterated at every epoch
            boundary, always in the same order. Where several processes train, all of them give the
            same batches, and the session shares the work out.
        loss: Maps (model, batch) to the losses of the batch's samples, shape [samples].
        plane: Address of a plane, or ``None`` to start an embedded one.
        mode: ``async`` takes what advice has arrived and never waits; ``lockstep`` waits for the
            answer to every observation, so that equal runs are equal to the bit, and for a plane
            that is away to come back; ``replay`` takes the decisions of a recorded run, and needs
            no plane.
        config: Everything else; ``None`` means the defaults.
        scaler: The scaler of the loss, where the loop has one.
        stateful: What else the training consists of, by name: schedulers, a GradScaler, samplers,
            averaged models; anything with ``state_dict`` and ``load_state_dict``. It is saved and
            resumed with the session.
        resume: A checkpoint to go on from; model, optimizer and ``stateful`` must be made as they
            were for the run that wrote it. The loop then starts at ``session.epoch``.
        replay: For mode ``replay``: a checkpoint that the recorded run wrote at its end. A run that
            is set up as that one was ends with the same weights.

    Attributes:
        run: Id of the run; Urza keeps its history, hash-chained, as ``runs/{run}``.
        history: Lifecycle events and one record per epoch.
        cost: Floating-point operations spent so far, by category.

    Raises:
        ValueError: If an argument breaks its rule, or the model is in an open session already;
            nothing has been started then.
        RanksDisagreeError: If the processes of a run do not hold the same model.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        epochs: int,
        held_out: Collection[Batch],
        loss: SampleLoss,
        plane: Address | None = None,
        mode: Mode = "async",
        config: EsperConfig | None = None,
        scaler: GradScaler | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        resume: str | PathLike[str] | Checkpoint | None = None,
        replay: str | PathLike[str] | Checkpoint | None = None,
    ) -> None:
        if not isinstance(model, MorphableModel):
            raise ValueError(
                f"model is a {type(model).__name__}, but a session needs a wrapped model: "
                "pass esper.wrap(model)"
            )
        check_run(epochs, mode, replays=replay is not None)
        if any(isinstance(getattr(o, "__self__", None), Session) for o in model.observers):
            raise ValueError("model is in an open session already: close that one first")
        self._optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        check_all(self._optimizers)
        self._config = config if config is not None else EsperConfig()
        check_plane(plane)
        check_candidates(self._config.candidates)
        if resume is not None and not isinstance(resume, Checkpoint):
            resume = read_checkpoint(resume)
        if replay is not None and not isinstance(replay, Checkpoint):
            replay = read_checkpoint(replay)
        self._model = model
        self._epochs = epochs
        self._held_out = held_out
        self._loss = loss
        self._mode = mode
        self._clock = Clock()
        self._closed = False
        self._failure: str | None = None  # of rank 0's plane, as it was told
        self._ranks = Ranks()
        self.run = agreement.shared_run(resume, self._ranks)
        self.history = History() if resume is None else resume.record.history()
        self._chronicle = Chronicle(self.run, self._clock, self.history)
        self.cost = TrainingCost(model, loss, held_out)
        if self._config.telemetry_interval is not None:
            model.telemetry_interval = self._config.telemetry_interval
        model.observers.append(self._on_transition)
        self._protocol = GraftProtocol(
            model, self._optimizers, self._config.graft, scaler, self._ranks
        )
        self._watch = Watch(self._config.governor, len(self._optimizers), scaled=bool(scaler))
        self._parts = TrainingParts(
            model, self._optimizers, self._protocol, stateful or {}, self._watch
        )
        run = Run(self._capture, self._go_back, self._chronicle.move, self._chronicle.rollback)
        self._governor = Governor(self._parts, self._config.governor, run, self._ranks)
        self._rewinding: set[str] = set()  # names of the data that ``batches`` iterates
        self._trials = Trials(
            model, held_out, loss, self._protocol, self.cost, self._config, self._ranks
        )
        self._taken: list[AdviceState] = []
        try:
            self._start_from(resume)
        except BaseException:
            self.cost.close()
            self._governor.close()
            self._protocol.close()
            model.observers.remove(self._on_transition)
            self._ranks.close()
            raise
        self._decisions = Decisions(model, self._protocol, self.cost, self._config)
        self._step_hooks = [
            user.register_step_post_hook(self._on_step) for user in self._optimizers
        ]
        self._link = self._chronicle.link = self._open_link(plane, resume, replay)
        if resume is not None or self._protocol.live:  # the plane may be one with an empty library
            self._link.compile(signatures(model))
        atexit.register(_close_forgotten, weakref.ref(self))

    def __enter__(self) -> "Session":
        if self._closed:
            raise ValueError("the session is closed, and a closed session cannot be opened again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """The epoch that is running, from 0."""
        return self._clock.epoch

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._clock.step

    @property
    def plane_failure(self) -> str | None:
        """Why the plane is gone, or ``None`` while it is there."""
        return self._link.failure or self._failure

    def epoch_end(self, *, train_loss: float | None = None) -> EpochRecord:
        """Ends an epoch: trials, verdicts, observation, and the advice that has arrived.

        Args:
            train_loss: The epoch's mean training loss; of several processes each gives its own,
                and the mean counts. ``None`` means not measured.

        Returns:
            The epoch's record, which is also the last one of ``history.epochs``.

        Raises:
            ValueError: If the session is closed or all epochs have ended.
            RanksDisagreeError: If the processes of the run have come to differ.
        """
        if self._closed:
            raise ValueError("the session is closed, but epoch_end needs an open one")
        if self._clock.epoch >= self._epochs:
            raise ValueError(
                f"epochs is {self._epochs}, but epoch_end was called {self._clock.epoch + 1} times"
            )
        agreement.check_steps(self._clock.step, self._ranks)
        agreement.share(self._model.buffers(), self._ranks)
        self._governor.settle()
        last = self._clock.epoch == self._epochs - 1
        measures = last or self._clock.epoch % self._config.evaluation_interval == 0
        losses: Tensor | None = None
        if self._trials.are_due(last=last) or (measures and not (last and self._protocol.live)):
            losses = self._measure()
            before = self.history.held_out_losses()
            while self._governor.check_held_out(
                before, float(losses.mean()), self._clock.num_steps
            ):
                losses = self._measure()
        losses = self._trials.hold(self._clock.epoch, self.history.trials, losses, last=last)
        if last and self._protocol.live:
            self._protocol.finish()
            losses = None  # of another model
        if losses is None and measures:
            losses = self._measure()
        self.cost.pool(self._ranks)
        record = EpochRecord(
            epoch=self._clock.epoch,
            step=self._clock.step,
            train_loss=agreement.mean(train_loss, self._ranks),
            held_out_loss=None if losses is None else float(losses.mean()),
            parameters=self._model.num_parameters(),
            flops=self.cost.total,
            alphas={
                (slot, seed): float(self._model.alpha(slot, seed))
                for slot, seed in self._model.occupied_seeds()
            },
        )
        self.history.epochs.append(record)
        self._consult(record, apply=not last)
        self._clock.epoch += 1
        self._clock.epoch_first_step = self._clock.step
        self._governor.start_afresh(epoch=True)
        return record

    def attribution(self) -> list[SeedAttribution]:
        """Measures what each live seed is worth now: held-out loss with that seed alone muted.

        One pass over the held-out data, which the processes of a run share: all of them call this.
        It is on the bill as an evaluation and as trials.
        """
        records = measure_attribution(self._model, self._held_out, self._loss, self._ranks)
        if records:
            self.cost.add_evaluation(records[0].num_samples)
            self.cost.add_trial(len(records) * records[0].num_samples)
        return records

    def note_loss(self, loss: Tensor | float) -> None:
        """Tells the governor the loss of the step to come; it sees the gradients by itself.

        Args:
            loss: A scalar, which nobody waits for; of several for one step the highest counts.
                Where several processes train, their losses differ and are not looked at.
        """
        if not self._ranks.is_shared:
            self._watch.note_loss(loss)

    def batches(self, data: Iterable[T]) -> Iterator[T]:
        """Iterates training data so that a rollback takes it back too.

        Data with a position of its own (``state_dict`` and ``load_state_dict``) that was given in
        ``stateful`` is iterated anew from the position that was restored; other data goes on, and
        what it gave since the snapshot is not seen again in this epoch.

        Args:
            data: The batches of an epoch, or what is left of them.
        """
        names = {name for name, part in self._parts.stateful.items() if id(part) == id(data)}
        self._rewinding |= names
        return draw(data, self._governor, rewinds=bool(names))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a checkpoint from which ``resume`` goes on; call it between two steps.

        In ``lockstep`` mode a run that goes on from it ends as it would have ended, to the bit.

        Args:
            path: The folder to write; a checkpoint of that name is replaced.

        Raises:
            ValueError: If the session is closed, something in ``stateful`` is no data, or the
                folder cannot be written.
        """
        if self._closed:
            raise ValueError("the session is closed, but save needs an open one")
        self._governor.settle()
        self.cost.pool(self._ranks)
        write_checkpoint(path, self._model, self._capture(), self._record(), self._ranks)
        self._governor.start_afresh(epoch=False)

    def close(self) -> None:
        """Ends the session: hooks off, what is left is sent, an embedded plane stops."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as last_first:  # all of it, whatever an observer raises
            last_first.callback(self._ranks.close)
            last_first.callback(self._close_link)
            last_first.callback(self.cost.close)
            last_first.callback(self._model.observers.remove, self._on_transition)
            last_first.callback(self._protocol.close)
            last_first.callback(self._governor.close)
            for hook in self._step_hooks:
                last_first.callback(hook.remove)
            self._protocol.finish()

    def _open_link(
        self, plane: Address | None, resume: Checkpoint | None, replay: Checkpoint | None
    ) -> PlaneLink | SilentLink:
        if not self._ranks.leads:
            return SilentLink()
        if replay is not None:
            return ReplayLink(replay.record.decisions)
        return PlaneLink(
            plane,
            self._config.candidates,
            self.run,
            patience_s=self._config.lockstep_timeout_s if self._mode == "lockstep" else 0.0,
            state=None if resume is None else resume.record.link_state(),
        )

    def _capture(self) -> TrainingState:
        clock = self._clock
        return self._parts.capture(clock.epoch, clock.step, clock.epoch_first_step)

    def _go_back(self, training: TrainingState) -> None:
        self._parts.restore(training, leave=self._parts.positions() - self._rewinding)
        self._clock.step = training.step

    def _measure(self) -> Tensor:
        losses = sample_losses(self._model, self._held_out, self._loss, self._ranks)
        self.cost.add_evaluation(len(losses))
        return losses

    def _record(self) -> RunRecord:
        link = self._link.state()
        return RunRecord(
            run=self.run,
            events=self.history.events,
            epochs=self.history.epochs,
            refusals=self.history.refusals,
            trials=self.history.trials,
            rollbacks=self.history.rollbacks,
            num_attempts=self._governor.num_attempts,
            spent=self.cost.spent,
            decisions=self._taken,
            memory=link.memory,
            pending=[AdviceState.of(advice, self._clock.epoch) for advice in link.pending],
            told=list(link.records),
        )

    def _start_from(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            adopted = ", ".join(f"{slot}[{seed}]" for slot, seed in self._protocol.adopt())
            if adopted:
                _log.info("esper: seeds under way are taken over: %s", adopted)
            return
        training, record = checkpoint.training_of(self._ranks.rank), checkpoint.record
        checkpoint.load_model(self._model)
        self._parts.restore(training)
        agreement.check_structure(self._model, training.step, self._ranks)
        self._clock.epoch, self._clock.step = training.epoch, training.step
        self._clock.epoch_first_step = training.epoch_first_step
        self._governor.num_attempts = record.num_attempts
        self._taken = list(record.decisions)
        self.cost.resume(record.spent)

    def _close_link(self) -> None:
        self._link.close()
        self.history.plane_failure = self._link.failure or self._failure

    def _on_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        is_first = optimizer is self._optimizers[0]
        self._clock.step += is_first
        if self._governor.after_optimizer(optimizer, self._clock.step):
            return
        self._protocol.on_step(optimizer)
        if is_first:
            self._governor.after_step(self._clock.step)

    def _on_transition(self, transition: Transition) -> None:
        self._chronicle.move(
            transition, self._protocol.live.get((transition.slot, transition.seed))
        )

    def _consult(self, record: EpochRecord, *, apply: bool) -> None:
        if self._ranks.is_shared:
            self._model.pool(self._ranks.gather(self._model.runtime()))
        signals = self._model.collect_signals(self._clock.epoch)
        self._governor.check_seeds(signals)
        self._link.compile(signatures(self._model))
        observation = observe(
            record,
            self.run,
            self._epochs,
            self._clock.num_steps,
            self._model,
            self._optimizers,
            self.cost,
            self.history.trials,
            signals,
            self._config,
        )
        self._link.observe(observation)
        self._chronicle.epoch(record)
        if self._mode != "async":
            advice = self._link.wait(self._clock.epoch, self._config.lockstep_timeout_s)
        else:
            advice = self._link.take()
        complete = [self._decisions.complete(item) for item in advice]
        shared, self._failure = agreement.shared_advice(
            complete, self._link.failure, self._clock.epoch, self._ranks
        )
        if apply and not self._governor.gave_up:
            for item in sorted(shared, key=lambda item: -item.decision.urgency):
                self._taken.append(AdviceState.of(item, self._clock.epoch))
                self._apply(item)
        agreement.check_structure(self._model, self._clock.step, self._ranks)
        newborns = [self._model.seed_parameters(*key) for key in self._protocol.live]
        agreement.share((weight for weights in newborns for weight in weights), self._ranks)

    def _apply(self, advice: Advice) -> None:
        steps_left = (self._epochs - 1 - self._clock.epoch) * self._clock.num_steps
        refusal = self._decisions.try_to(advice, epoch=self._clock.epoch, steps_left=steps_left)
        if refusal is not None:
            self.history.refusals.append(refusal)


def _close_forgotten(session: "weakref.ref[Session]") -> None:
    found = session()
    if found is not None:
        found.close()


session = Session
"""The name that a user calls: ``esper.session(model, optimizer, ...)`` opens a session."""
