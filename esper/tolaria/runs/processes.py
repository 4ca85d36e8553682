"""A run in several processes, as ``torchrun`` starts them."""

import gc
import os
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager

from torch import distributed
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from esper.tolaria.tasks.task import LabelledBatch


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that ``torchrun`` has started for a block; alone there is nothing to do.

    They train on the CPU, so they talk by gloo. What they tell each other of where they listen goes
    under the number of the restart: torchrun (2.13) keeps its store when it restarts, and a
    process that is early would find the addresses of those that are gone.

    At the end the groups are not only destroyed but gone, with their threads: a thread of gloo that
    lets go of a message's tensors takes the interpreter's lock, and before Python 3.14 an
    interpreter that is being taken down ends such a thread, which aborts the process ("terminate
    called without an active exception"). ``DistributedDataParallel`` holds its group in a cycle.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"restart-{attempt}", store)
    distributed.init_process_group("gloo", store=own, rank=rank, world_size=size)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        gc.collect()


def place() -> tuple[int, int]:
    """Returns the number of this process, from 0, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def check_batch_size(batch_size: int, num_ranks: int) -> None:
    """Refuses batches that processes cannot share evenly.

    Raises:
        ValueError: If they cannot.
    """
    if batch_size % num_ranks != 0:
        raise ValueError(
            f"the task's batches have {batch_size} samples, which {num_ranks} processes cannot "
            "share evenly: start as many processes as divide it"
        )


def shares(batches: Sequence[LabelledBatch], rank: int, num_ranks: int) -> list[LabelledBatch]:
    """Returns one process's part of each batch; all parts are of one size.

    So the mean of the parts' gradients is the gradient of the whole batch. The samples of an
    epoch's last batch that do not go round are left out of that epoch.

    Args:
        batches: Inputs, shape [samples, ...], and targets, shape [samples, ...], of all processes.
        rank: Number of the process.
        num_ranks: Number of processes.
    """
    parts: list[LabelledBatch] = []
    for inputs, targets in batches:
        num_samples = len(targets) // num_ranks
        rows = slice(rank * num_samples, (rank + 1) * num_samples)
        if num_samples > 0:
            parts.append((inputs[rows], targets[rows]))
    return parts
