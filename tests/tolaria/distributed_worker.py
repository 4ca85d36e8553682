"""One of the processes that grow a model together; torchrun starts it for test_distributed.py.

distributed_worker.py MODE FOLDER PLANE
"""

import contextlib
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from seed_host import to_state
from tolaria import governed
from torch import distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.blueprints import get
from esper.blueprints import lower
from esper.common.sharding import is_part
from esper.common.v1 import blueprint_pb2
from esper.config import Candidate
from esper.config import EsperConfig
from esper.config import GraftConfig
from esper.config import GrowthConfig
from esper.kasmina import MorphableModel
from esper.tolaria import Checkpoints
from esper.tolaria import Session
from esper.tolaria import tasks
from esper.tolaria.agreement import check_steps
from esper.tolaria.agreement import check_structure
from esper.tolaria.attribution import attribution
from esper.tolaria.evaluation import sample_losses
from esper.tolaria.plans import complete_plan
from esper.tolaria.protocol import GraftProtocol
from esper.tolaria.ranks import Ranks
from esper.tolaria.runs.processes import joined

TASK = tasks.get("digits")
CONFIG = EsperConfig(
    candidates=(Candidate(blueprint="widen", ranks=(8,)),),
    graft=GraftConfig(training_steps=5, ramp_steps=8, stabilization_steps=2),
    # Two places score nearly the same, and the last digit of a score depends on who measured it.
    growth=GrowthConfig(where="random", min_score_ratio=0.0, rest_epochs=0),
    significance=0.5,
    telemetry_interval=4,
)
EPOCHS = 6
BATCH = 128
MIDDLE = 32  # steps: one seed has fossilised, another one is under way
HELD_OUT = TASK.validation.batches(150)  # three batches: the second rank has one less


def wrapped() -> MorphableModel:
    """A new model, equal in all processes."""
    return esper.wrap(TASK.host(0), target_layers=["net"], seeds_per_layer=2)


@contextlib.contextmanager
def gradients_shared(module: nn.Module, shared: bool) -> Iterator[None]:
    """Says whether the backward in the block averages gradients, as torch's wrappers want it."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(shared)
        yield
    elif isinstance(module, DistributedDataParallel) and not shared:
        with module.no_sync():
            yield
    else:
        yield


def train(
    model: MorphableModel,
    module: nn.Module,
    plane: str,
    folder: Path,
    *,
    rank: int = 0,
    size: int = 1,
    after_step: Callable[[Session], None] = lambda session: None,
) -> Session:
    """Trains in a user's plain loop with accumulation, and a checkpoint after every epoch.

    Args:
        model: The wrapped model.
        module: What is called to train it: itself, or what wraps it.
        plane: Address of the plane.
        folder: Where the checkpoints go, and what the run goes on from.
        rank: Which part of each global batch this process trains on.
        size: How many parts there are.
        after_step: Called after every step.
    """
    mine = torch.arange(BATCH).chunk(size)[rank]
    rows_of = mine.chunk(2)  # the gradients of two parts are accumulated
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    checkpoints = Checkpoints(folder, keep_last=EPOCHS)
    with esper.session(
        model,
        optimizer,
        epochs=EPOCHS,
        held_out=HELD_OUT,
        loss=TASK.loss,
        plane=plane,
        mode="lockstep",
        config=CONFIG,
        stateful={"schedule": schedule},
        resume=checkpoints.latest(),
    ) as session:
        after_step(session)
        for _ in range(session.epoch, EPOCHS):
            model.train()
            total = 0.0
            batches = TASK.train.batches(BATCH)[:-1]
            for inputs, targets in batches:
                optimizer.zero_grad()
                for part, last in ((rows_of[0], False), (rows_of[1], True)):
                    with gradients_shared(module, last):
                        loss = TASK.loss(module, (inputs[part], targets[part])).mean() / 2
                        loss.backward()
                    total += float(loss.detach())
                optimizer.step()
                after_step(session)
            session.epoch_end(train_loss=total / len(batches))
            schedule.step()
            session.save(checkpoints.path(session.step))
            checkpoints.prune()
    return session


def seed_all(seed: int) -> None:
    """Seeds every global random generator; a checkpoint keeps them all."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sharded() -> MorphableModel:
    """The model, spread over the processes."""
    model = wrapped()
    for layer in model.host.net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def grow(plane: str, folder: Path) -> None:
    """Grows one model under DDP and one that is sharded, and goes on with the latter.

    What comes last is a session's end, as in a user's script: ``joined`` says why a message must
    not be the last thing that a process does.
    """
    rank = distributed.get_rank()
    disagree(folder, rank)
    seed_all(rank)
    model = wrapped()
    train(model, DistributedDataParallel(model), plane, folder / "ddp", rank=rank, size=2)
    model = sharded()
    train(model, model, plane, folder / "fsdp", rank=rank, size=2)
    model = sharded()
    seed_all(7)
    session = train(model, model, plane, folder / "fsdp", rank=rank, size=2)
    assert session.epoch == EPOCHS
    esper.save(model, folder / "model")
    join(plane, folder, rank)


def join(plane: str, folder: Path, rank: int) -> None:
    """Goes on, in two processes, from the middle of the run that one process has made."""
    middle = Checkpoints(folder / "single").path(MIDDLE)
    if rank == 0:
        shutil.copytree(middle, folder / "joined" / middle.name)
    distributed.barrier()
    model = wrapped()
    train(model, DistributedDataParallel(model), plane, folder / "joined", rank=rank, size=2)


def ramp_together(ranks: Ranks) -> None:
    """Brings a seed in while the ranks see different outputs of one host that moves."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GraftConfig(
        training_steps=0, ramp_steps=10, ramp="drift", drift_tolerance=0.05, stabilization_steps=0
    )
    protocol = GraftProtocol(model, optimizer, config, ranks=ranks)
    kernel = lower(get("lora"), model.signature("0", 0, blueprint_pb2.SEED_SOURCE_OUTPUT))
    protocol.germinate("0", 0, "kernels/lora", kernel, None, complete_plan(None, config), "")
    alphas = []
    for step in range(7):
        with torch.no_grad():
            model.host[0].weight.mul_(1.0 + 0.1 * step)
        inputs = torch.randn(5 + ranks.rank, 6, generator=torch.Generator().manual_seed(ranks.rank))
        model(inputs + ranks.rank)
        own = [sums.clone() for sums in model.drift_sums()]
        protocol.on_step()
        alphas.append(model.alpha("0", 0))
    assert not torch.equal(mean(own[0], ranks), own[0]), "each rank sees its own part"
    totals = ranks.sum(alphas)
    assert totals == [2 * alpha for alpha in alphas], "and yet both ramp alike, to the bit"
    assert 0 < alphas[-1] < 0.5


def mean(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The mean of the ranks' tensors."""
    total = tensor.clone()
    ranks.add_up(total)
    return total / ranks.size


def disagree(folder: Path, rank: int) -> None:
    """Lets the ranks differ, and writes down what each is told of it."""
    ranks = Ranks()
    model = wrapped()
    model(TASK.train.inputs[:2])
    with (folder / f"told-{rank}").open("w") as told:

        def attempt(what: Callable[[], object]) -> None:
            try:
                what()
            except (RuntimeError, ValueError) as error:
                print(f"{type(error).__name__}: {error}", file=told)

        attempt(lambda: sample_losses(model, HELD_OUT[rank:], TASK.loss, ranks))
        attempt(lambda: check_steps(5 + rank, ranks))
        if rank == 1:
            model.germinate("net", 1, "widen", rank=8)
        attempt(lambda: check_structure(model, 5, ranks))
        attempt(lambda: refuse_to_adopt(ranks))
    both, one, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        one.grad = torch.tensor([4.0, 8.0])
    ranks.average_gradients([both, one, none])
    ramp_together(ranks)
    assert both.grad.tolist() == [1.5, 3.0]
    assert one.grad is not None and one.grad.tolist() == [2.0, 4.0]
    assert none.grad is None
    ranks.close()


def govern(plane: str, folder: Path) -> None:
    """Breaks a batch of the second process alone, and looks at what the governor makes of it."""
    governed.PLANE.append(plane)
    rank = distributed.get_rank()
    ranks = Ranks()
    attribute_together(ranks)
    for parallel in (fully_shard, DistributedDataParallel):
        for works in (False, True):
            go_back_together(parallel, rank, ranks, works=works)
    ranks.close()


def go_back_together(
    parallel: Callable[[MorphableModel], nn.Module], rank: int, ranks: Ranks, *, works: bool
) -> None:
    """Compares a run that goes back with one that never saw the broken batch.

    Args:
        parallel: What spreads the model.
        rank: Number of this process.
        ranks: All processes.
        works: Whether a seed acts on the host, and is held responsible.
    """
    stream = [(images[rank::2], targets[rank::2]) for images, targets in governed.STREAM]
    hurt, clean = (governed.Loop(parallel=parallel) for _ in range(2))
    with hurt.session, clean.session:
        for loop in (hurt, clean):
            torch.manual_seed(7 + rank)
            loop.plant(training_steps=3 if works else 100)
            for batch in stream[:8]:
                loop.step(batch)
        hurt.step(stream[8])  # it shows that the state after step 8 was good
        hurt.step(governed.poisoned(stream[9]) if rank == 1 else stream[9])
        (record,) = hurt.session.history.rollbacks
        assert (record.step, record.to_step) == (10, 8), record
        assert record.seeds == ([("net", 0)] if works else []), record
        assert "gradient norm" in record.reason, record
        if works:
            clean.model.advance("net", 0, "ROLLED_BACK", record.reason)
            clean.model.set_embargo("net", 0, governed.QUICK.embargo_steps)
        governed.assert_equal(hurt, clean)
        random_state = torch.get_rng_state()
        for loop in (hurt, clean):
            torch.set_rng_state(random_state)
            for batch in stream[10:20]:
                loop.step(batch)
        governed.assert_equal(hurt, clean)
        check_structure(hurt.model, 18, ranks)
        for parameter in hurt.model.parameters():
            whole = parameter.full_tensor() if is_part(parameter) else parameter
            assert torch.equal(mean(whole.detach(), ranks), whole), "the same on all ranks"


def attribute_together(ranks: Ranks) -> None:
    """Shares the work of an attribution, whose figures are those of one process."""
    torch.manual_seed(0)
    model = wrapped()
    model(TASK.train.inputs[:2])
    for seed in range(2):
        to_state(model, "net", seed, "FOSSILIZED")
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(None))
    shared = attribution(model, HELD_OUT, TASK.loss, ranks)
    assert len(passes) == 3 * 2, "two of the three batches, as the last round has one for both"
    hook.remove()
    assert shared == attribution(model, HELD_OUT, TASK.loss) and len(shared) == 2
    spread = fully_shard(model)
    for mine, alone in zip(attribution(spread, HELD_OUT, TASK.loss, ranks), shared, strict=True):
        assert abs(mine.gain - alone.gain) < 1e-6


def refuse_to_adopt(ranks: Ranks) -> None:
    """Gives a model with a seed under way to a protocol of several processes."""
    model = wrapped()
    model(TASK.train.inputs[:2])
    model.germinate("net", 1, "widen", rank=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GraftProtocol(model, optimizer, GraftConfig(), ranks=ranks).adopt()


def elastic(plane: str, folder: Path) -> None:
    """Grows as under DDP; the second process is killed once, in the middle of an epoch."""
    rank = distributed.get_rank()
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    seed_all(rank + 10 * attempt)

    def after_step(session: Session) -> None:
        with (folder / f"steps-{rank}-{attempt}").open("a") as steps:
            print(session.step, file=steps)
        if rank == 1 and attempt == 0 and session.step == MIDDLE + 4:
            os.kill(os.getpid(), signal.SIGKILL)

    model = wrapped()
    parallel = DistributedDataParallel(model)
    train(model, parallel, plane, folder, rank=rank, size=2, after_step=after_step)


def main() -> None:
    mode, folder, plane = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    with joined():
        {"grow": grow, "govern": govern, "elastic": elastic}[mode](plane, folder)
    if mode == "elastic":  # the group of a sharded model stays in caches of torch
        assert threads_of_gloo() == 0, "a message under way could end the process as it leaves"


def threads_of_gloo() -> int:
    """How many threads of process groups this process has."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")


if __name__ == "__main__":
    main()
