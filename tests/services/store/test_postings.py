"""Secondary indexes against a brute-force search, and what a search costs."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.services.store import postings
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.store.postings import Place
from esper.services.store.postings import Postings
from esper.services.store.postings import entries

ORDERS = [b"0", b"1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    opened = Store(tmp_path_factory.mktemp("s"), Schema(("index",), version=1))
    yield opened
    opened.close()


def fill(store: Store, records: dict[int, tuple[set[int], int | None]]) -> Postings:
    """Indexes records: attributes, and a figure for the second order, where they have one."""
    index = Postings(store, "index")

    def work(row: Row) -> None:
        row.drop(store.table("index"), delete=False)
        for key in records:
            # By way of another state, so that rows of former states must go.
            before = entries(bytes([key]), [b"z"], [Place(b"0"), Place(b"1", b"\0")])
            index.replace(row, set(), before)
            index.replace(row, before, rows_of(key, *records[key]))

    store.submit(work).result(10)
    return index


def rows_of(key: int, attributes: set[int], figure: int | None) -> set[bytes]:
    places = [Place(b"0")] + ([Place(b"1", bytes([figure]))] if figure is not None else [])
    return entries(bytes([key]), [b"%d" % name for name in attributes], places)


RECORDS = st.dictionaries(
    st.integers(0, 40),
    st.tuples(st.sets(st.integers(0, 4), max_size=4), st.none() | st.integers(0, 3)),
    max_size=30,
)
CONDITIONS = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None)
@given(RECORDS, CONDITIONS, st.integers(0, 1), st.integers(1, 5))
def test_a_search_finds_what_looking_at_everything_finds(
    store: Store,
    records: dict[int, tuple[set[int], int | None]],
    conditions: list[list[int]],
    order: int,
    turn: int,
) -> None:
    index = fill(store, records)
    wanted = sorted(
        (figure if order else 0, key)
        for key, (attributes, figure) in records.items()
        if all(attributes & set(any_of) for any_of in conditions)
        and (order == 0 or figure is not None)
    )
    names = [[b"%d" % name for name in any_of] for any_of in conditions]
    found: list[int] = []
    start: bytes | None = b""
    while start is not None:  # a few at a time, each from where the one before ended
        with store.reading() as row:
            search = index.search(row, ORDERS[order], names, start)
            part = list(itertools.islice(search, turn))
            start = search.next_start
        found += [position[-1] for position in part]
    assert found == [key for _, key in wanted]


def lengthy(number: int) -> dict[int, tuple[set[int], int | None]]:
    return {key: ({key % 2, 3} if key != number - 1 else {0, 1}, None) for key in range(number)}


def test_a_search_that_finds_nothing_stops_and_can_go_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postings, "MAX_SEEKS", 20)
    index = fill(store, lengthy(200))
    start: bytes | None = b""
    turns = 0
    found: list[bytes] = []
    while start is not None:
        with store.reading() as row:
            search = index.search(row, b"0", [[b"0"], [b"1"]], start)
            found += search
            start = search.next_start
        turns += 1
    assert found == [bytes([199])]
    assert turns > 5


def test_a_search_whose_finds_are_all_refused_stops_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postings, "MAX_SEEKS", 20)
    index = fill(store, lengthy(200))
    found: list[bytes] = []
    start: bytes | None = b""
    while start is not None:
        with store.reading() as row:
            search = index.search(row, b"0", [[b"0", b"1"]], start)
            part = list(search)
            start = search.next_start
        assert len(part) <= 20
        found += part
    assert found == [bytes([key]) for key in range(200)]


def seeks(store: Store, number: int, conditions: list[list[bytes]]) -> int:
    index = Postings(store, "index")

    def work(row: Row) -> None:
        row.drop(store.table("index"), delete=False)
        for key in range(number):
            names = [b"all", b"%d" % (key % 2), b"rare" if key % (number // 10) == 0 else b"some"]
            index.replace(row, set(), entries(key.to_bytes(4, "big"), names, [Place(b"0")]))

    store.submit(work).result(30)
    with store.reading() as row:
        search = index.search(row, b"0", conditions, b"")
        assert len(list(itertools.islice(search, 5))) == 5
        return postings.MAX_SEEKS - search.budget.left


@pytest.mark.parametrize(
    "conditions",
    [
        [[b"all"]],
        [[b"1"]],
        [[b"all"], [b"rare"]],
        [[b"rare"], [b"all"]],
        [[b"0"], [b"rare", b"nothing"], [b"all"]],
    ],
)
def test_the_cost_of_a_search_does_not_grow_with_the_store(
    store: Store, conditions: list[list[bytes]]
) -> None:
    assert seeks(store, 20_000, conditions) <= seeks(store, 200, conditions)
