from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Schema
from esper.services.store.requests import RequestTable
from esper.services.store.requests import check_request_id
from esper.services.store.requests import fingerprint


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path, Schema(("requests",), 1))
    yield opened
    opened.close()


def asked(text: str) -> bytes:
    return fingerprint("M", digest_pb2.Digest(hash=text))


def test_the_first_answer_is_given_again(store: Store) -> None:
    table = RequestTable(store, "requests", 10)
    store.submit(lambda row: table.remember(row, "M", "id", asked("a"), b"answer")).result(10)
    with store.reading() as row:
        assert table.recall(row, "M", "id", asked("a")) == b"answer"
        assert table.recall(row, "Other", "id", asked("a")) is None
        assert table.recall(row, "M", "other", asked("a")) is None
        with pytest.raises(ServiceError) as caught:
            table.recall(row, "M", "id", asked("b"))
    assert caught.value.violations[0].field == "request_id"


def test_no_id_is_not_remembered(store: Store) -> None:
    table = RequestTable(store, "requests", 10)
    store.submit(lambda row: table.remember(row, "M", "", asked("a"), b"answer")).result(10)
    with store.reading() as row:
        assert table.recall(row, "M", "", asked("a")) is None
        assert row.stat(store.table("requests"))["entries"] == 0


def test_the_oldest_are_forgotten(store: Store) -> None:
    table = RequestTable(store, "requests", 3)
    for number in range(8):
        request_id = f"id-{number}"
        store.submit(lambda row, i=request_id: table.remember(row, "M", i, asked("a"), b"x"))
    store.submit(lambda row: None).result(10)
    with store.reading() as row:
        known = [
            number
            for number in range(8)
            if table.recall(row, "M", f"id-{number}", asked("a")) is not None
        ]
        assert row.stat(store.table("requests"))["entries"] == 6
    assert known == [5, 6, 7]


@pytest.mark.parametrize("request_id", ["", "a", "0f8fad5b-d9cb-469f-a165-70867728950e", "x" * 64])
def test_good_ids(request_id: str) -> None:
    assert check_request_id(request_id) == []


@pytest.mark.parametrize("request_id", ["x" * 65, "a b", "\n", "\N{BULLET}", "a\0"])
def test_bad_ids(request_id: str) -> None:
    assert [violation.field for violation in check_request_id(request_id)] == ["request_id"]
