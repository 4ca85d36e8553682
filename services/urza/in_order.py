"""Work that is done in threads, one piece after the other, behind whoever hands it in."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from concurrent.futures import Future

from esper.services.store.waking import awaitable


class InOrder:
    """Does pieces of work in order.

    The event loop is not woken for each piece: that and the way back to the thread would take
    longer than many pieces do.

    Args:
        executor: Does the work; where several pieces may wait, it must have a single thread. None
            does each at once, which is for those that take less than a hop to a thread.
        max_waiting: How many pieces may wait or be under way, at least 1.
    """

    def __init__(self, executor: Executor | None, max_waiting: int) -> None:
        self._executor = executor
        self._max_waiting = max_waiting
        self._pending: deque[Future[None]] = deque()

    async def add(self, work: Callable[[], None]) -> None:
        """Hands in the next piece, once there is room for it; raises what an earlier one raised."""
        if self._executor is None:
            work()
            return
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        if len(self._pending) == self._max_waiting:
            await awaitable(self._pending.popleft())
        self._pending.append(self._executor.submit(work))

    async def settle(self) -> None:
        """Waits for all of it; raises what the first that failed has raised."""
        while self._pending:
            await awaitable(self._pending.popleft())
