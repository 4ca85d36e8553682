"""One of two processes that train a wrapped model together; run by test_distributed.py."""

import copy
import sys

import torch
from torch import distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from esper.kasmina import wrap

ROAD = ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING")
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


def grown():
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), seeds_per_layer=2)
    plant(model, "0", 0, "widen", "FINE_TUNING")
    return model


def plant(model, slot, seed, blueprint, state):
    model.germinate(slot, seed, blueprint, rank=2)
    for stage in ROAD[: ROAD.index(state) + 1]:
        model.advance(slot, seed, stage)
    for parameter in model.seed_parameters(slot, seed):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))


def train(model, module, rows, apart=()):
    """Three steps; the gradients of parameters that nobody else averages are averaged here."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(X[rows]), TARGET[rows]).backward()
        for parameter in apart:
            distributed.all_reduce(parameter.grad, distributed.ReduceOp.AVG)
        optimizer.step()


def main(mode, rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    single, shared = grown(), grown()
    mine = slice(4 * rank, 4 * rank + 4)
    if mode == "ddp":
        train(single, single, slice(None))
        train(shared, DistributedDataParallel(shared), mine)
        # A newborn's parameters are shared by wrapping anew, before its first step.
        for model in (single, shared):
            plant(model, "2", 1, "bottleneck", "TRAINING")
        train(single, single, slice(None))
        train(shared, DistributedDataParallel(shared), mine)
    else:
        whole = copy.deepcopy(single)
        for layer in (shared.host[0], shared.host[2]):
            fully_shard(layer)
        fully_shard(shared)
        train(single, single, slice(None))
        train(shared, shared, mine)
        assert any(isinstance(p, DTensor) for p in shared.parameters())
        moved = zip(single.parameters(), whole.parameters(), strict=True)
        assert all(not torch.equal(now, before) for now, before in moved)
        # A newborn in a model that is sharded already is whole in each process ...
        for model in (single, shared):
            plant(model, "2", 1, "bottleneck", "FINE_TUNING")
        newborn = shared.seed_parameters("2", 1)
        assert not any(isinstance(p, DTensor) for p in newborn)
        train(single, single, slice(None))
        train(shared, shared, mine, apart=newborn)
        # ... until its slot is sharded too.
        fully_shard(shared.slots["2"])
        assert all(isinstance(p, DTensor) for p in shared.seed_parameters("2", 1))
        train(single, single, slice(None))
        train(shared, shared, mine)
    for (name, one), (_, other) in zip(
        single.named_parameters(), shared.named_parameters(), strict=True
    ):
        full = other.full_tensor() if isinstance(other, DTensor) else other
        torch.testing.assert_close(full, one, msg=lambda text, name=name: f"{name}: {text}")
    distributed.barrier()
    distributed.destroy_process_group()


main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
