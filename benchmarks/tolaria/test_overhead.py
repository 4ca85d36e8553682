"""What a growth session costs while nothing has germinated, against the bare training loop.

Steps of the loops alternate. Telemetry, the end of the epoch and the thread that talks with a real
embedded plane are on the session's bill; the bare loop validates on the same batches, as loops do.
The bare loop runs twice, in two copies of the model: how far these are apart, by where in memory
they happen to be, says how much a ratio means, and their mean is what is compared with. It is
processor time: what others take of a shared machine is no cost of ours, and that nobody waits for
the plane is shown elsewhere (tests/tolaria/test_async.py).
"""

import copy
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch import nn
from torch.nn import functional as F

import esper
from esper.config import EsperConfig
from esper.config import GrowthConfig
from esper.plane import EmbeddedPlane
from esper.tolaria import Session

NUM_STEPS = 390
"""Steps of an epoch: those of CIFAR-10 in batches of 128."""
CHUNK = 10
"""Steps of one loop between two turns of the other."""
NUM_VALIDATION_BATCHES = 40
LINK_S = 2.0
"""Time after an epoch in which the link's thread does what the epoch has given it to do."""
NUM_EPOCHS = 3
"""The first one, in which costs are counted and kernels are asked for, is told apart."""

Batch = tuple[Tensor, Tensor]


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(96, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 96)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.token(ids)).mean(dim=1))
        return logits


def _cnn() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(3, 16),
        *block(16, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        *block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _tokens() -> Batch:
    return torch.randint(0, 96, (8, 32)), torch.randint(0, 96, (8,))


def _images() -> Batch:
    return torch.randn(16, 3, 24, 24), torch.randint(0, 10, (16,))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "transformer": (_Transformer, _tokens),
    "cnn": (_cnn, _images),
}


def _loss(model: nn.Module, batch: object) -> Tensor:
    inputs, targets = batch  # type: ignore[misc]
    return F.cross_entropy(model(inputs), targets, reduction="none")


class _Loop:
    """A training loop in steps, and the processor time that it has taken, the link's apart."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.taken_s = 0.0
        self._batches = itertools.cycle(batches)

    def step(self) -> None:
        self.optimizer.zero_grad()
        _loss(self.model, next(self._batches)).mean().backward()
        self.optimizer.step()

    def timed(self, run: Callable[[], object]) -> None:
        started_s = time.process_time() - _link_s()
        run()
        self.taken_s += time.process_time() - _link_s() - started_s

    def steps(self) -> None:
        for _ in range(CHUNK):
            self.step()


def _validate(model: nn.Module, batches: Sequence[Batch]) -> float:
    model.eval()
    with torch.no_grad():
        return float(torch.cat([_loss(model, batch) for batch in batches]).mean())


def _link_s() -> float:
    """Processor time that the session's own thread has taken."""
    (thread,) = (one for one in threading.enumerate() if one.name == "esper-plane-link")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _epoch(
    bare: Sequence[_Loop], grown: _Loop, session: Session, held_out: Sequence[Batch]
) -> tuple[float, float]:
    """Runs an epoch of all loops.

    Returns:
        The time of the session's loop over the mean of the bare ones, and that of the second bare
        one over the first.
    """
    loops, link_s = (*bare, grown), _link_s()
    for loop in loops:
        loop.taken_s = 0.0
        loop.model.train()
    orders = itertools.cycle(itertools.permutations(loops))  # nobody always follows the same one
    for order in itertools.islice(orders, NUM_STEPS // CHUNK):
        for loop in order:
            loop.timed(loop.steps)
    for loop in bare:
        loop.timed(partial(_validate, loop.model, held_out))
    grown.timed(session.epoch_end)
    time.sleep(LINK_S)
    first_s, second_s = (loop.taken_s for loop in bare)
    return (grown.taken_s + _link_s() - link_s) * 2 / (first_s + second_s), second_s / first_s


@pytest.mark.parametrize("targets", ["auto", "default"])
@pytest.mark.parametrize("case", CASES)
def test_an_epoch(benchmark: BenchmarkFixture, case: str, targets: str) -> None:
    build, draw = CASES[case]
    torch.manual_seed(0)
    host = build()
    chosen = {"target_layers": "auto"} if targets == "auto" else {}
    wrapped = esper.wrap(copy.deepcopy(host), preserve_original=False, **chosen)
    batches = [draw() for _ in range(64)]
    held_out = [draw() for _ in range(NUM_VALIDATION_BATCHES)]
    bare = [_Loop(copy.deepcopy(host), batches) for _ in range(2)]
    grown = _Loop(wrapped, batches)
    config = EsperConfig(growth=GrowthConfig(first_epoch=NUM_EPOCHS))
    with (
        EmbeddedPlane() as plane,
        Session(
            wrapped,
            grown.optimizer,
            epochs=NUM_EPOCHS,
            held_out=held_out,
            loss=_loss,
            plane=plane.address,
            config=config,
        ) as session,
    ):
        pairs = [_epoch(bare, grown, session, held_out) for _ in range(NUM_EPOCHS)]
        wrapped.train()
        benchmark.pedantic(grown.step, rounds=CHUNK)
        assert session.plane_failure is None
    assert session.history.events == [], "nothing germinated"
    ratios, controls = zip(*pairs, strict=True)
    ratio = statistics.median(ratios[1:])
    benchmark.group = f"session with {len(wrapped.slots)} dormant slots"
    benchmark.extra_info["time_over_bare"] = ratio
    benchmark.extra_info["first_epoch_over_bare"] = ratios[0]
    benchmark.extra_info["bare_over_bare"] = statistics.median(controls)
    print(
        f"\n{case}, {targets}: {len(wrapped.slots)} slots, epochs of {bare[0].taken_s:.1f} s: "
        f"{ratio:.4f} times the bare loop; the first {ratios[0]:.3f}, then "
        f"{' '.join(f'{one:.3f}' for one in sorted(ratios[1:]))}; "
        f"bare over bare {statistics.median(controls):.3f}"
    )
