"""One training run that can be killed at any time and started again: it goes on where it was.

    python benchmarks/chaos/trainer.py FOLDER --plane ADDRESS

Prints `finished DIGEST` at its end, a digest over weights, optimizer, seeds and history.
"""

import hashlib
import json
from pathlib import Path

import click
import numpy as np
import torch

import esper
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.tolaria import Checkpoints
from esper.tolaria import Trainer
from esper.tolaria import tasks

CONFIG = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(4, 8)),),
    graft=GraftConfig(training_steps=5, ramp_steps=10, stabilization_steps=3),
    telemetry_interval=4,
)
SAVE_EVERY_STEPS = 5


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--plane", required=True)
@click.option("--epochs", default=8, show_default=True)
def main(folder: Path, plane: str, epochs: int) -> None:
    """Trains the digits host in lockstep, from the newest sound checkpoint on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    task = tasks.get("digits")
    model = esper.wrap(task.host(0), target_layers=["net"], seeds_per_layer=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(task.train.inputs, task.train.targets),
        task.batch_size,
        shuffle=True,
    )
    trainer = Trainer(
        model,
        optimizer,
        train=data,
        held_out=task.held_out_batches(),
        loss=task.loss,
        epochs=epochs,
        plane=plane,
        mode="lockstep",
        config=CONFIG,
        on_epoch=lambda record: schedule.step(),
        stateful={"schedule": schedule},
        checkpoints=Checkpoints(folder, keep_last=3),
        save_every_steps=SAVE_EVERY_STEPS,
        resume=True,
    )
    history = trainer.fit()
    if history.plane_failure is not None:
        raise click.ClickException(f"the plane was lost: {history.plane_failure}")
    last = Checkpoints(folder).paths()[0]
    digest = hashlib.sha256()
    for name in ("state.safetensors", "model/weights.safetensors", "model/architecture.json"):
        digest.update((last / name).read_bytes())
    # All that was recorded but the random id of the run.
    digest.update(json.dumps([event.to_json() for event in history.events]).encode())
    digest.update(repr(history.epochs).encode())
    grown = sum(event.after == "FOSSILIZED" for event in history.events)
    click.echo(f"finished {digest.hexdigest()} {grown}")


if __name__ == "__main__":
    main()
