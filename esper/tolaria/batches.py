"""Iterates training data so that a rollback takes it back too."""

from collections.abc import Iterable
from collections.abc import Iterator
from typing import TypeVar

from esper.tolaria.governor import Governor

T = TypeVar("T")


def draw(data: Iterable[T], governor: Governor, *, rewinds: bool) -> Iterator[T]:
    """Yields the batches of an epoch.

    Args:
        data: The batches, or what is left of them.
        governor: Says which are left out, and takes its snapshots between two of them.
        rewinds: Whether the data has a position of its own, which a rollback restores: it is then
            iterated anew. Other data goes on.
    """
    again = True
    while again:
        again = False
        before = governor.num_rollbacks
        governor.before_batch()
        source = iter(data)
        while not again:
            governor.before_batch()
            try:
                batch = next(source)
            except StopIteration:
                break
            governor.drawn += 1
            if rewinds and governor.drawn in governor.left_out:
                continue
            yield batch
            again = rewinds and governor.num_rollbacks > before
