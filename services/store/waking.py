"""Tells event loops of what a thread has done, once for many things.

Waking a loop costs a system call, and the thread that makes it gives the interpreter up to the loop
for as long as that has work. A thread that settles many futures therefore gathers its calls.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

T = TypeVar("T")

_Call = Callable[[], None]


class _Gathered(threading.local):
    calls: dict[asyncio.AbstractEventLoop, list[_Call]] | None = None


_HERE = _Gathered()


@contextmanager
def gathered() -> Iterator[None]:
    """Holds back this thread's calls of `call_on` and makes them together at the end."""
    calls: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
    _HERE.calls = calls
    try:
        yield
    finally:
        _HERE.calls = None
        for loop, all_of_it in calls.items():
            _wake(loop, all_of_it)


def call_on(loop: asyncio.AbstractEventLoop, call: _Call) -> None:
    """Has `call`, which must not raise, made by a loop soon; nothing happens on a closed one."""
    if _HERE.calls is None:
        _wake(loop, (call,))
    else:
        _HERE.calls.setdefault(loop, []).append(call)


def awaitable(future: "Future[T]") -> "asyncio.Future[T]":
    """Returns what stands for `future` on the running loop; cancelling one cancels the other."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[T] = loop.create_future()

    def give_up(ended: "asyncio.Future[T]") -> None:
        if ended.cancelled():
            future.cancel()

    waiting.add_done_callback(give_up)
    # A future keeps its callbacks, so they must not refer to it: what it holds would stay with it.
    future.add_done_callback(lambda done: call_on(loop, partial(_settle, waiting, done)))
    return waiting


def _settle(waiting: "asyncio.Future[T]", done: "Future[T]") -> None:
    if waiting.done():
        return
    if done.cancelled():
        waiting.cancel()
    elif (problem := done.exception()) is not None:
        waiting.set_exception(problem)
    else:
        waiting.set_result(done.result())


def _wake(loop: asyncio.AbstractEventLoop, calls: Sequence[_Call]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_make, calls)


def _make(calls: Sequence[_Call]) -> None:
    for call in calls:
        call()
