"""Wakes the streams that follow something that grows."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from esper.services.store.waking import call_on


class Followers:
    """Who waits for news of what, by name. To be made and followed on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def following(self, *names: str) -> Iterator[asyncio.Event]:
        """Gives an event that is set whenever one of `names` may have grown."""
        news = asyncio.Event()
        for name in names:
            self._news.setdefault(name, set()).add(news)
        try:
            yield news
        finally:
            for name in names:
                waiting = self._news[name]
                waiting.discard(news)
                if not waiting:
                    del self._news[name]

    def wake(self, name: str) -> None:
        """Wakes the followers of `name`; may be called from any thread."""
        call_on(self._loop, lambda: self._set(name))

    def _set(self, name: str) -> None:
        for news in self._news.get(name, ()):
            news.set()


async def first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Waits until one of `events` is set, or until the time is up."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
