"""A loop in which the governor can be seen at work, and the faults that it is to find."""

import math
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.optim import Adam
from torch.optim import Optimizer
from torch.optim import lr_scheduler

import esper
from esper.blueprints import get
from esper.blueprints import kernel_digest
from esper.blueprints import lower
from esper.common.sharding import is_part
from esper.common.v1 import lifecycle_pb2
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GovernorConfig
from esper.tamiyo.v1 import controller_pb2
from esper.tolaria import Session
from esper.tolaria import tasks

TASK = tasks.get("digits")
QUICK = GovernorConfig(check_every_steps=1, snapshot_every_steps=4)

CONFIG = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(2,)),), telemetry_interval=3, governor=QUICK
)
PLANE: list[str] = []

Batch = tuple[Tensor, Tensor]


class Host(nn.Module):
    """Draws from the random state, and has buffers that every training forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)
        )
        self.drop = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        scores: Tensor = self.net(self.drop(images.flatten(1)))
        return scores


class Loop:
    """A user's own loop with everything in it that a rollback has to take back."""

    def __init__(
        self,
        make: Callable[..., Optimizer] = Adam,
        *,
        governor: GovernorConfig = QUICK,
        scaler: GradScaler | None = None,
        learning_rate: float = 0.01,
        tell: bool = True,
        seed: int = 0,
        epochs: int = 2,
        resume: Path | None = None,
        parallel: Callable[[esper.MorphableModel], nn.Module] = lambda model: model,
    ) -> None:
        torch.manual_seed(seed)
        self.model = esper.wrap(Host(), ["net"], seeds_per_layer=2)
        self.model(TASK.train.inputs[:8])
        self.module = parallel(self.model)
        self.optimizer = make(self.model.parameters(), lr=learning_rate)
        self.schedule = lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.scaler = scaler
        self.tell = tell
        self.losses: list[float] = []
        stateful: dict[str, object] = {"schedule": self.schedule}
        if scaler is not None:
            stateful["scaler"] = scaler
        self.session = Session(
            self.model,
            self.optimizer,
            epochs=epochs,
            held_out=TASK.held_out_batches(),
            loss=TASK.loss,
            plane=PLANE[0],
            config=replace(CONFIG, governor=governor),
            scaler=scaler,
            stateful=stateful,  # type: ignore[arg-type]
            resume=resume,
        )

    def plant(
        self, blueprint_name: str = "bottleneck", *, seed: int = 0, training_steps: int = 3
    ) -> str:
        slot = "net"
        blueprint = get(blueprint_name, rank=3)
        signature = self.model.signature(slot, seed, blueprint.graph.inputs[0].source)
        kernel = lower(blueprint, signature)
        plan = controller_pb2.GraftPlan(
            training_steps=training_steps,
            alpha=lifecycle_pb2.AlphaSchedule(steps=200),
            learning_rate_scale=1.0,
        )
        name = f"kernels/{kernel_digest(kernel)}"
        self.session._protocol.germinate(slot, seed, name, kernel, None, plan, "a test")
        return name

    def step(self, batch: Batch, *, rate: float = 1.0, scale: float = 1.0) -> None:
        images, targets = batch
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.module(images), targets) * scale
        if self.tell:
            self.session.note_loss(loss)
        for group in self.optimizer.param_groups:
            group["lr"] *= rate
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        self.losses.append(float(loss.detach()))

    def everything(self) -> list[Tensor]:
        """Weights, buffers, optimizers, random state, telemetry; of sharded ones the parts."""
        model, session = self.model, self.session
        training = session._capture()
        grafts = [graft.optimizer for graft in training.grafts]
        kept = [
            value
            for state in (*training.optimizers, *(o.optimizer for o in grafts if o is not None))
            for opaque in state.state.values()
            for value in opaque.value.values()  # type: ignore[attr-defined]
            if isinstance(value, Tensor)
        ]
        buffers = list(model.buffers())
        rates = torch.tensor([group["lr"] for group in self.optimizer.param_groups])
        telemetry = [
            slot.telemetry.stats
            for slot in training.runtime.slots.values()
            if slot.telemetry is not None
        ]
        bank = torch.frombuffer(bytearray(model.bank.to_bytes()), dtype=torch.uint8)
        tensors = [*model.parameters(), *buffers, *kept, rates, *telemetry, bank]
        return [tensor.to_local() if is_part(tensor) else tensor for tensor in tensors]


def batches(seed: int = 0) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from TASK.train_batches(seed, epoch)  # type: ignore[misc]
        epoch += 1


def assert_equal(first: Loop, second: Loop) -> None:
    for mine, theirs in zip(first.everything(), second.everything(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.session.step == second.session.step


def poisoned(batch: Batch) -> Batch:
    images = batch[0].clone()
    images[3, 7] = math.nan
    return images, batch[1]


def momentum(parameters: Iterator[nn.Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=0.9)


STREAM = [batch for _, batch in zip(range(40), batches(), strict=False)]
