"""Hosts and grown models for the tests of models at rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.kasmina import MorphableModel

Plant = Callable[..., None]
ROAD = ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED")


class Net(nn.Module):
    """A host with a block, a normalisation, tied weights and a persistent buffer."""

    scale: Tensor

    def __init__(self, width: int = 12, *, tied: bool = True, extra: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if extra:
            self.extra = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.block(x))
        out: Tensor = self.head(x) * self.scale
        return out


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def new_host() -> Callable[..., nn.Module]:
    """Makes hosts; equal seeds make equal ones."""

    def make(seed: int = 0, **arguments: int | bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Net(**arguments)

    return make


@pytest.fixture
def plant() -> Plant:
    """Brings a graft into a state, with weights that count: a graft is born as the identity."""

    def grow(
        model: MorphableModel,
        slot: str,
        seed: int,
        blueprint: str,
        until: str = "FOSSILIZED",
        **hyperparameters: int | float | bool | str,
    ) -> None:
        model.germinate(slot, seed, blueprint, **hyperparameters)
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for parameter in model.seed_parameters(slot, seed):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for state in ROAD[: ROAD.index(until) + 1]:
            model.advance(slot, seed, state)

    return grow


@pytest.fixture
def grown(new_host: Callable[..., nn.Module], tokens: Tensor, plant: Plant) -> MorphableModel:
    """A Net with grafts in many states, next to seeds and slots that hold nothing."""
    model = esper.wrap(new_host(), target_layers=[nn.Linear, "block", "norm"], seeds_per_layer=3)
    model(tokens)
    plant(model, "block", 0, "bottleneck", rank=4)
    plant(model, "block", 2, "widen", rank=3, until="STABILIZATION")
    plant(model, "block.0", 1, "affine")
    plant(model, "block.2", 0, "glu", rank=2, until="TRAINING")
    plant(model, "norm", 1, "norm_mlp", until="FINE_TUNING")
    plant(model, "head", 0, "lora", rank=2, until="GRAFTING")
    model.set_seed_alpha("head", 0, 0.25)
    plant(model, "head", 1, "bottleneck", rank=2, source="input", until="GRAFTING")
    for _ in range(3):
        model.tick()
    model.germinate("norm", 0, "bottleneck", rank=2)
    plant(model, "block.2", 1, "affine", until="GRAFTING")
    model.cull("block.2", 1)
    return model


@pytest.fixture
def folder(tmp_path: Path, grown: MorphableModel) -> Path:
    esper.save(grown, tmp_path / "model")
    return tmp_path / "model"
