"""Events of a stream that never ends by itself, as the clients hand them out."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable
from typing import Generic
from typing import Protocol
from typing import Self
from typing import TypeVar

import grpc

from esper.common.rpc import decode_error

Response = TypeVar("Response")
ResponseOut = TypeVar("ResponseOut", covariant=True)
Item = TypeVar("Item")


class _Call(Protocol[ResponseOut]):
    """What a server-streaming call of a stub returns, as far as it is used here."""

    def __next__(self) -> ResponseOut: ...
    def cancel(self) -> object: ...


class Following(Generic[Response, Item]):
    """What one stream brings, in order, without end.

    Iterating blocks until the next item. `close` ends it, from any thread.

    Args:
        call: The open call.
        item: Takes the item out of a response.
    """

    def __init__(self, call: _Call[Response], item: Callable[[Response], Item]) -> None:
        self._call = call
        self._item = item
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        """Returns the next item.

        Raises:
            RpcError: UNAVAILABLE where the server went away: follow again from the next position;
                OUT_OF_RANGE where there is no such position; NOT_FOUND where there is no such name.
        """
        try:
            return self._item(next(self._call))
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise decode_error(error) from error

    def close(self) -> None:
        """Ends the call; the iteration stops."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AsyncCall(Protocol[ResponseOut]):
    """What a server-streaming call of an asyncio stub returns, as far as it is used here."""

    def __aiter__(self) -> AsyncIterator[ResponseOut]: ...
    def cancel(self) -> object: ...


class AsyncFollowing(Generic[Response, Item]):
    """`Following` for one event loop.

    Args:
        call: The open call.
        item: Takes the item out of a response.
    """

    def __init__(self, call: _AsyncCall[Response], item: Callable[[Response], Item]) -> None:
        self._call = call
        self._responses = aiter(call)
        self._item = item
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        """Returns the next item.

        Raises:
            RpcError: As `Following` does.
        """
        try:
            return self._item(await anext(self._responses))
        except asyncio.CancelledError:
            if self._closed:
                raise StopAsyncIteration from None
            raise
        except grpc.RpcError as error:
            raise decode_error(error) from error

    def close(self) -> None:
        """Ends the call; the iteration stops."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
