"""Answers to small reads, kept until anything is written."""

from collections.abc import Callable
from typing import Generic
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message

from esper.services.serving.errors import invalid
from esper.services.store.engine import Store

MAX_ANSWERS = 1024
MAX_ANSWER_BYTES = 16 << 10
"""A larger answer is not kept: making it takes longer than what is spared."""

Request = TypeVar("Request", bound=Message)


class Answers(Generic[Request]):
    """Answers one unary method that only reads, from bytes to bytes.

    An answer that was given before is given again, as it went over the wire, unless something was
    committed to the store since. Reading and serializing a record takes few instructions, but they
    are spread over much code and memory, and between two calls the processor forgets: a third of a
    call went there.

    To be used on one event loop.

    Args:
        store: Holds the rows that the answers are made of.
        kind: Class of the requests.
        ask: Answers a request; what it raises is not kept.
    """

    def __init__(
        self, store: Store, kind: type[Request], ask: Callable[[Request], Message]
    ) -> None:
        self._store = store
        self._kind = kind
        self._ask = ask
        self._known: dict[bytes, bytes] = {}
        self._num_commits = store.num_commits

    def answer(self, request: bytes) -> bytes:
        """Returns the serialized answer to a serialized request.

        Raises:
            ServiceError: INVALID_ARGUMENT where it is none; and what `ask` raises.
        """
        # Looked at before the rows are: an answer is never newer than its number says.
        num_commits = self._store.num_commits
        if num_commits != self._num_commits:
            self._known.clear()
            self._num_commits = num_commits
        answer = self._known.get(request)
        if answer is None:
            answer = self._ask(self._parsed(request)).SerializeToString()
            if len(answer) <= MAX_ANSWER_BYTES:
                if len(self._known) == MAX_ANSWERS:
                    self._known.clear()
                self._known[request] = answer
        return answer

    def _parsed(self, request: bytes) -> Request:
        try:
            return self._kind.FromString(request)
        except DecodeError:
            name = self._kind.DESCRIPTOR.full_name
            raise invalid("request", f"{len(request)} bytes", f"must be a {name}") from None
