"""A small host, and seeds brought to any state in it."""

import torch
from torch import nn

from esper.kasmina import SeedLifecycleState

State = SeedLifecycleState


class Net(nn.Module):
    """A host with an attribute and a method of its own, and a slot named like a method."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.keys = nn.Linear(8, 4)
        self.classes = ("a", "b", "c", "d")

    def forward(self, x):
        return self.keys(self.body(x))

    def names_of(self, x):
        return [self.classes[i] for i in self(x).argmax(dim=1).tolist()]


def to_state(model, slot, seed, state, blueprint="bottleneck", **hyperparameters):
    usual = {} if blueprint in ("affine", "depthwise") else {"rank": 2}
    model.germinate(slot, seed, blueprint, **(hyperparameters or usual))
    if state != State.GERMINATED:
        for stage in range(State.TRAINING, State[state] + 1):
            model.advance(slot, seed, stage)
    # Not zero as at birth.
    for parameter in model.seed_parameters(slot, seed):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
