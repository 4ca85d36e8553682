"""What a session asks the plane with: the places that its model offers, and what it has seen."""

from collections.abc import Iterable
from collections.abc import Sequence

from torch.optim import Optimizer

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.common.v1 import signal_pb2
from esper.config import BudgetConfig
from esper.config import EsperConfig
from esper.kasmina import MorphableModel
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria import recipe
from esper.tolaria import trials
from esper.tolaria.cost import TrainingCost
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import TrialRecord


def signatures(model: MorphableModel) -> list[kernel_pb2.KernelSignature]:
    """Returns what a kernel must fit, for every seed and source of the slots known so far."""
    sources = (blueprint_pb2.SEED_SOURCE_INPUT, blueprint_pb2.SEED_SOURCE_OUTPUT)
    return [
        model.signature(name, seed, source)
        for name, layer in model.slots.items()
        if layer.width is not None
        for seed in range(layer.num_seeds)
        for source in sources
        if source == blueprint_pb2.SEED_SOURCE_OUTPUT or layer.source_width is not None
    ]


def to_proto(limits: BudgetConfig) -> controller_pb2.Budget:
    """Returns a budget as it stands in an observation."""
    budget = controller_pb2.Budget(min_gain_per_mflop=limits.min_gain_per_mflop)
    if limits.max_parameters is not None:
        budget.max_parameters = limits.max_parameters
    if limits.max_flops_per_sample is not None:
        budget.max_flops_per_sample = limits.max_flops_per_sample
    return budget


def observe(
    record: EpochRecord,
    run: str,
    num_epochs: int,
    num_steps: int,
    model: MorphableModel,
    optimizers: Iterable[Optimizer],
    cost: TrainingCost,
    held: Iterable[TrialRecord],
    signals: Sequence[signal_pb2.HealthSignal],
    config: EsperConfig,
) -> controller_pb2.Observation:
    """Returns what the controller is told of an epoch.

    Args:
        record: The epoch.
        run: Id of the run.
        num_epochs: Planned length of the run.
        num_steps: Optimizer steps of the epoch.
        model: The growing model.
        optimizers: The user's optimizers.
        cost: Knows what the model costs.
        held: Trials of the run.
        signals: What every seed has shown in the epoch.
        config: Budget and recipe.
    """
    graph = model.host_graph()
    observation = controller_pb2.Observation(
        run=run,
        epoch=record.epoch,
        num_epochs=num_epochs,
        steps_per_epoch=num_steps,
        host_graph_digest=graph.digest,
        host_graph=graph,
        signals=signals,
        learning_rates=[float(group["lr"]) for user in optimizers for group in user.param_groups],
        num_parameters=record.parameters,
        flops_per_sample=cost.forward_flops_per_sample(),
        budget=to_proto(config.budget),
        recipe=recipe.to_proto(config.growth),
        trials=[trials.to_proto(trial) for trial in held if trial.epoch == record.epoch],
    )
    if record.held_out_loss is not None:
        observation.held_out_loss = record.held_out_loss
    if record.train_loss is not None:
        observation.train_loss = record.train_loss
    return observation
