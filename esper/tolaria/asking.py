"""What a session asks the plane with: the places that its model offers, and its budget."""

from esper.common.v1 import blueprint_pb2
from esper.common.v1 import kernel_pb2
from esper.config import BudgetConfig
from esper.kasmina import MorphableModel
from esper.tamiyo.v1 import controller_pb2


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
