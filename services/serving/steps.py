"""Long work that answers bit by bit, for the methods that stream it."""

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


async def in_steps(steps: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """Yields what a blocking generator yields, which runs in threads and is closed at the end.

    Args:
        steps: Yields no None.
    """
    step: asyncio.Future[T | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
            item = await asyncio.shield(step)
            if item is None:
                return
            yield item
    finally:
        # Shielded: gRPC may cancel a call twice, and what the generator holds must be given back.
        await asyncio.shield(_close(step, steps))


async def _close(step: "asyncio.Future[T | None] | None", steps: Generator[T, None, None]) -> None:
    if step is not None:
        await asyncio.wait([step])
    await asyncio.to_thread(steps.close)
