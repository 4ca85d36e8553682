"""Wakes the streams that follow something that grows."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Followers:
    """Who waits for news of what, by name. To be made and followed on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def following(self, name: str) -> Iterator[asyncio.Event]:
        """Gives an event that is set whenever `name` may have grown."""
        news = asyncio.Event()
        self._news.setdefault(name, set()).add(news)
        try:
            yield news
        finally:
            waiting = self._news[name]
            waiting.discard(news)
            if not waiting:
                del self._news[name]

    def wake(self, name: str) -> None:
        """Wakes the followers of `name`; may be called from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, name)

    def _set(self, name: str) -> None:
        for news in self._news.get(name, ()):
            news.set()
