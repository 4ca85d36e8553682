"""Futures of the writer thread on an event loop."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.services.store.waking import awaitable
from esper.services.store.waking import call_on
from esper.services.store.waking import gathered


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often it is woken."""

    woken = 0

    def call_soon_threadsafe(self, *arguments: object, **options: object) -> asyncio.Handle:
        self.woken += 1
        return super().call_soon_threadsafe(*arguments, **options)


def settle(futures: list["Future[int]"]) -> None:
    with gathered():
        for number, future in enumerate(futures):
            if number % 3:
                future.set_result(number)
            else:
                future.set_exception(KeyError(number))


def test_a_thread_settles_many_futures_and_wakes_the_loop_once() -> None:
    async def run() -> tuple[list[object], int]:
        futures: list[Future[int]] = [Future() for _ in range(100)]
        waiting = [awaitable(future) for future in futures]
        before = loop.woken
        thread = threading.Thread(target=settle, args=(futures,))
        thread.start()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
        thread.join()
        return list(outcomes), loop.woken - before

    loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        outcomes, woken = runner.run(run())
    assert woken == 1
    for number, outcome in enumerate(outcomes):
        if number % 3:
            assert outcome == number
        else:
            assert isinstance(outcome, KeyError)


@pytest.mark.parametrize("settle_it", [Future.cancel, lambda future: future.set_result(1)])
def test_a_future_that_is_over_already_is_awaited_as_it_is(
    settle_it: Callable[["Future[int]"], object],
) -> None:
    async def run() -> int:
        future: Future[int] = Future()
        settle_it(future)
        return await asyncio.wait_for(awaitable(future), 60)

    if settle_it is Future.cancel:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == 1


def test_a_caller_that_goes_takes_its_work_back() -> None:
    async def run() -> bool:
        future: Future[int] = Future()
        waiting = awaitable(future)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)  # the callbacks of what was cancelled run then
        return future.cancelled()

    assert asyncio.run(run())


def test_what_has_been_awaited_is_freed_at_once() -> None:
    async def run() -> object:
        future: Future[int] = Future()
        waiting = awaitable(future)
        future.set_result(1)
        assert await waiting == 1
        known = weakref.ref(future)
        del future, waiting
        return known()

    gc.disable()
    try:
        assert asyncio.run(run()) is None
    finally:
        gc.enable()


def test_a_loop_that_is_closed_is_left_alone() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    made: list[int] = []
    call_on(loop, lambda: made.append(1))
    with gathered():
        call_on(loop, lambda: made.append(2))
    assert not made


def test_gathering_is_for_the_thread_that_does_it() -> None:
    async def run() -> None:
        made = asyncio.Event()
        with gathered(), ThreadPoolExecutor(1) as pool:
            pool.submit(call_on, asyncio.get_running_loop(), made.set)
            await asyncio.wait_for(made.wait(), 60)

    asyncio.run(run())
