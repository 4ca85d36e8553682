"""Answers that are kept: the same until something is written, and never an old one after."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.services.serving.errors import ServiceError
from esper.services.serving.errors import not_found
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
from esper.services.urza.answers import MAX_ANSWER_BYTES
from esper.services.urza.answers import MAX_ANSWERS
from esper.services.urza.answers import Answers
from esper.urza.v1 import library_pb2 as pb

TABLE = "texts"


class Texts:
    """Answers with the text that stands under a name; counts how often it looked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.num_looks = 0
        self._answers = Answers(store, pb.GetKernelRequest, self._look)

    def write(self, name: str, text: str) -> None:
        table = self._store.table(TABLE)
        self._store.submit(lambda row: row.put(name.encode(), text.encode(), db=table)).result(60)

    def ask(self, name: str) -> str:
        request = pb.GetKernelRequest(name=name).SerializeToString()
        return pb.GetKernelResponse.FromString(self.ask_bytes(request)).kernel.name

    def ask_bytes(self, request: bytes) -> bytes:
        return self._answers.answer(request)

    def _look(self, request: pb.GetKernelRequest) -> pb.GetKernelResponse:
        self.num_looks += 1
        with self._store.reading() as row:
            text = row.get(request.name.encode(), db=self._store.table(TABLE))
        if text is None:
            raise not_found(request.name)
        return pb.GetKernelResponse(kernel=pb.KernelRecord(name=text.decode()))


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[Texts]:
    with contextlib.closing(Store(tmp_path, Schema((TABLE,), 1))) as store:
        yield Texts(store)


def test_an_answer_is_kept_until_something_is_written(texts: Texts) -> None:
    texts.write("a", "1")
    texts.write("b", "2")
    assert [texts.ask("a"), texts.ask("b"), texts.ask("a"), texts.ask("b")] == ["1", "2"] * 2
    assert texts.num_looks == 2
    for number in range(50):
        texts.write("a", str(number))
        assert texts.ask("a") == str(number)
        assert texts.ask("b") == "2"


def test_what_is_not_there_is_asked_for_again(texts: Texts) -> None:
    for _ in range(2):
        with pytest.raises(ServiceError, match="does not exist"):
            texts.ask("a")
    assert texts.num_looks == 2


def test_what_is_kept_is_bounded(texts: Texts) -> None:
    texts.write("large", "x" * MAX_ANSWER_BYTES)
    for looks in (1, 2):
        assert len(texts.ask("large")) == MAX_ANSWER_BYTES
        assert texts.num_looks == looks
    texts.write("a", "1")
    # Requests that differ in a field that nobody knows are asked for each.
    request = pb.GetKernelRequest(name="a").SerializeToString()
    for number in range(MAX_ANSWERS + 1):
        texts.ask_bytes(request + b"\x78" + bytes([number & 127 | 128, number >> 7]))
    looks = texts.num_looks
    texts.ask_bytes(request + b"\x78\x80\x00")  # the first of them
    assert texts.num_looks == looks + 1


def test_what_is_no_request_is_refused(texts: Texts) -> None:
    with pytest.raises(ServiceError, match=r"3 bytes.*GetKernelRequest"):
        texts.ask_bytes(b"\x0a\xff\xff")
