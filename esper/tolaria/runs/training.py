"""Runs a configuration: builds task, host and optimizer, trains, logs, and keeps the model."""

import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim import lr_scheduler

from esper.artifacts import save
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.kasmina import wrap
from esper.plane import EmbeddedPlane
from esper.tolaria.attribution import attribution
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.history import EpochRecord
from esper.tolaria.report import versions
from esper.tolaria.runs import processes
from esper.tolaria.runs.config import OptimizerConfig
from esper.tolaria.runs.config import RunConfig
from esper.tolaria.runs.config import dump_config
from esper.tolaria.runs.folder import EpochMetrics
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.folder import RunInfo
from esper.tolaria.runs.loggers import RunLogger
from esper.tolaria.runs.loggers import scalars
from esper.tolaria.trainer import Trainer

Progress = Callable[[EpochMetrics], None]


def train(
    config: RunConfig,
    folder: RunFolder,
    *,
    plane: str | None = None,
    resume: bool = False,
    loggers: Sequence[RunLogger] = (),
    progress: Progress = lambda metrics: None,
) -> RunInfo:
    """Trains what a configuration describes, into a run folder.

    Where ``torch.distributed`` is initialised, all processes call this and share each batch of the
    task; the first one alone writes, logs and talks to the plane.

    A run that was interrupted goes on from its newest sound checkpoint with ``resume``; in
    ``lockstep`` mode it ends as if it had never stopped, to the bit.

    Args:
        config: What to do.
        folder: Where everything goes; made where missing.
        plane: Address of a running plane; ``None`` starts one whose store is in the folder.
        resume: Go on with the run of the folder; without it the folder must hold none.
        loggers: Told of every epoch and event besides; closed at the end, whatever happens.
        progress: Told of every epoch.

    Returns:
        What run.json says at the end; without results in all processes but the first.

    Raises:
        ValueError: If the folder holds a run and ``resume`` was not asked for, or the
            configuration does not fit the task.
        OSError: If the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)
        return _train(config, folder, plane, resume, loggers, progress)


def _train(
    config: RunConfig,
    folder: RunFolder,
    plane: str | None,
    resume: bool,
    loggers: Sequence[RunLogger],
    progress: Progress,
) -> RunInfo:
    if not resume:
        folder.check_free()
    rank, num_ranks = processes.place()
    task = config.load_task()
    processes.check_batch_size(task.batch_size, num_ranks)
    model = wrap(
        config.build_host(task),
        target_layers=_target_layers(config),
        seeds_per_layer=config.host.seeds_per_layer,
        example_inputs=task.train.inputs[:2],
    )
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer)
    if rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_config(dump_config(config))
    info = RunInfo(
        run="",
        task=config.task,
        epochs=config.epochs,
        status="running",
        plane=plane,
        versions=versions(),
    )
    log = _Log(folder, info, optimizer, num_ranks, loggers, progress)
    trainer: Trainer

    def on_epoch(record: EpochRecord) -> None:
        if rank == 0:
            log.epoch(trainer, record)
        _step(scheduler, record)

    with contextlib.ExitStack() as stack:
        if plane is None and rank == 0:
            plane = stack.enter_context(EmbeddedPlane(folder.path / "plane")).address
        trainer = Trainer(
            model,
            optimizer,
            train=lambda epoch: processes.shares(
                task.train_batches(config.seed, epoch), rank, num_ranks
            ),
            held_out=task.held_out_batches(),
            loss=task.loss,
            epochs=config.epochs,
            plane=plane,
            mode=config.mode,
            config=_growth(config),
            parallel=DistributedDataParallel(model) if num_ranks > 1 else None,
            on_epoch=on_epoch,
            stateful={} if scheduler is None else {"scheduler": scheduler},
            checkpoints=Checkpoints(
                folder.path / "checkpoints",
                keep_last=config.checkpoints.keep_last,
                keep_best=config.checkpoints.keep_best,
            ),
            save_every_steps=config.checkpoints.every_steps,
            resume=resume,
        )
        try:
            history = trainer.fit()
        except BaseException:
            info.status = "failed"
            if rank == 0:
                folder.write_info(info)
            raise
    if rank != 0:
        return info
    folder.write_history(history)
    folder.write_attribution(attribution(model, task.held_out_batches(), task.loss))
    save(model, folder.model_path, task=config.task, history=history.events)
    info.results = {
        "test_accuracy": task.accuracy(model, task.test),
        "test_loss": task.mean_loss(model, task.test),
        "parameters": float(model.num_parameters()),
        "flops": float(history.epochs[-1].flops),
    }
    info.status = "finished"
    folder.write_info(info)
    return info


@dataclass
class _Log:
    folder: RunFolder
    info: RunInfo
    optimizer: Optimizer
    num_ranks: int
    loggers: Sequence[RunLogger]
    progress: Progress

    def __post_init__(self) -> None:
        self._epochs = self.folder.epochs()
        self._num_events: int | None = None
        self._started_s = time.perf_counter()

    def epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        session = trainer.session
        assert session is not None, "an epoch ends inside of fit"
        now_s = time.perf_counter()
        wall_s, self._started_s = now_s - self._started_s, now_s
        metrics = EpochMetrics(
            epoch=record.epoch,
            step=record.step,
            train_loss=record.train_loss,
            held_out_loss=record.held_out_loss,
            parameters=record.parameters,
            flops=record.flops,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            samples_per_s=trainer.num_samples * self.num_ranks / wall_s,
            wall_s=wall_s,
            rollbacks=sum(one.epoch == record.epoch for one in session.history.rollbacks),
        )
        self._epochs = [one for one in self._epochs if one.epoch < record.epoch] + [metrics]
        self.folder.write_epochs(self._epochs)
        self.folder.write_history(session.history)
        if self.info.run != session.run:
            self.info.run = session.run
            self.folder.write_info(self.info)
        events = session.history.events
        if self._num_events is None:  # those before a resumed run began are logged already
            self._num_events = sum(event.epoch < record.epoch for event in events)
        for logger in self.loggers:
            logger.log_scalars(scalars(metrics), record.step)
            for event in events[self._num_events :]:
                logger.log_event(event)
        self._num_events = len(events)
        self.progress(metrics)


def _step(scheduler: lr_scheduler.LRScheduler | None, record: EpochRecord) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        if record.held_out_loss is not None:
            scheduler.step(record.held_out_loss)
    elif scheduler is not None:
        scheduler.step()


def make_optimizer(model: MorphableModel, config: OptimizerConfig) -> Optimizer:
    """Returns the optimizer that a configuration names, over all of a model's parameters.

    Raises:
        ValueError: If the class does not take the options.
    """
    kind: Callable[..., Optimizer] = getattr(torch.optim, config.name)
    try:
        return kind(model.parameters(), lr=config.learning_rate, **config.options)
    except TypeError as error:
        raise ValueError(f"optimizer.options do not fit {config.name}: {error}") from error


def make_scheduler(
    optimizer: Optimizer, config: OptimizerConfig
) -> lr_scheduler.LRScheduler | None:
    """Returns the scheduler that a configuration names, or ``None``.

    Raises:
        ValueError: If the class does not take the options.
    """
    if config.scheduler is None:
        return None
    kind: Callable[..., lr_scheduler.LRScheduler] = getattr(lr_scheduler, config.scheduler)
    try:
        return kind(optimizer, **config.scheduler_options)
    except TypeError as error:
        name = config.scheduler
        raise ValueError(f"optimizer.scheduler_options do not fit {name}: {error}") from error


def _target_layers(config: RunConfig) -> str | list[str]:
    layers = config.host.target_layers
    return layers if isinstance(layers, str) else list(layers)


def _growth(config: RunConfig) -> EsperConfig:
    growth = replace(config.growth.growth, seed=config.seed)
    if not config.grow:
        growth = replace(growth, first_epoch=config.epochs)
    return replace(config.growth, growth=growth)
