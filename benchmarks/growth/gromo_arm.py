"""GroMo's variance transfer on the width arena; run by the Python of an environment with GroMo.

    python benchmarks/growth/gromo_arm.py DATA.npz OUT.json LEARNING_RATE FIRST_SEED SEEDS SPLIT

It imports nothing of Esper, so that neither library can change the other. ``DATA.npz`` holds
``train_x``, ``train_y`` and the same for ``validation`` and ``test``; the schedule of growth (three
doublings at the ends of the first three epochs) and the optimizer made anew after each are those of
GroMo's own examples.
"""

import json
import math
import sys
import time

import numpy as np
import torch
from gromo.containers.growing_mlp import GrowingMLP
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

STEPS, BATCH, HOLD, WARM_UP = 170, 64, 0.5, 10
GROWTH = {17: 8, 34: 16, 51: 32}


def rate(step: int, peak: float) -> float:
    """The schedule of the other arms, see ``Recipe``."""
    progress = step / STEPS
    decay = 1.0
    if progress > HOLD:
        decay = 0.5 * (1.0 + math.cos(math.pi * (progress - HOLD) / (1.0 - HOLD)))
    return peak * decay * min(1.0, (step + 1) / WARM_UP)


def grow(model: nn.Module, units: int) -> None:
    """Adds hidden units by variance transfer."""
    layer = model._growing_layers[0]
    layer.create_layer_extensions(
        extension_size=units,
        output_extension_init="kaiming",
        input_extension_init="kaiming",
        neuron_pairing="vv_z_negz",
        rescaling="default_vt",
    )
    layer.apply_change(extension_size=units, scaling_factor=1.0)
    layer.delete_update(include_previous=True)


def train(data: dict[str, torch.Tensor], seed: int, peak: float, split: str) -> dict[str, object]:
    """Trains one model; returns its outcome."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = GrowingMLP(
        in_features=64,
        out_features=10,
        hidden_size=8,
        number_hidden_layers=1,
        activation=nn.ReLU(),
        flatten=False,
        device=torch.device("cpu"),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=peak)
    inputs, targets = data["train_x"], data["train_y"]
    flops, per_step, order, epoch = 0, 0, torch.arange(0), 0
    for step in range(STEPS):
        if step in GROWTH:
            grow(model, GROWTH[step])
            optimizer = torch.optim.Adam(model.parameters(), lr=peak)
            per_step = 0
        if len(order) == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order, epoch = torch.randperm(len(inputs), generator=generator), epoch + 1
        rows, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, peak)
        model.train()
        with FlopCounterMode(display=False) as counter:
            loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        per_step = counter.get_total_flops()
        flops += per_step
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(data[f"{split}_x"]).argmax(dim=1) == data[f"{split}_y"]
    return {
        "arm": "GroMo, variance transfer",
        "seed": seed,
        "figure": 100.0 * float(right.double().mean()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "wall_s": time.perf_counter() - started,
    }


def main() -> None:
    """Trains one model a seed and writes their outcomes."""
    source, out, peak, first, number, split = sys.argv[1:]
    torch.set_num_threads(1)
    data = {name: torch.from_numpy(array) for name, array in np.load(source).items()}
    seeds = range(int(first), int(first) + int(number))
    outcomes = [train(data, seed, float(peak), split) for seed in seeds]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(outcomes, file)


if __name__ == "__main__":
    main()
