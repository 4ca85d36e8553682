import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.store.paging import MAX_PAGE_BYTES
from esper.services.store.paging import PageTokens
from esper.services.store.paging import read_page


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    opened = Store(tmp_path_factory.mktemp("s"), Schema(("things",), 1))
    yield opened
    opened.close()


def change(store: Store, remove: set[bytes], add: set[bytes], clear: bool = False) -> None:
    def work(row: Row) -> None:
        table = store.table("things")
        if clear:
            row.drop(table, delete=False)
        for key in remove:
            row.delete(key, db=table)
        for key in add:
            value = digest_pb2.Digest(hash=key.decode(), size_bytes=len(key))
            row.put(key, value.SerializeToString(), db=table)

    store.submit(work).result(10)


KEYS = st.sets(
    st.text("abc", min_size=1, max_size=6).map(lambda text: f"p{text}".encode()), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(KEYS, st.lists(st.tuples(KEYS, KEYS), max_size=8), st.integers(1, 7))
def test_what_stays_is_listed_once_whatever_others_write(
    store: Store, keys: set[bytes], changes: list[tuple[set[bytes], set[bytes]]], size: int
) -> None:
    outside = {b"o", b"q", b"qab"}
    change(store, set(), keys | outside, clear=True)
    always, ever = set(keys), set(keys)
    present = set(keys)
    seen: list[bytes] = []
    start = b""
    turns = iter(changes)
    while True:
        with store.reading() as row:
            page, following = read_page(row, store.table("things"), b"p", start, size)
        assert len(page) <= size
        seen += [digest_pb2.Digest.FromString(value).hash.encode() for _, value in page]
        if following is None:
            break
        assert len(page) == size
        start = following
        remove, add = next(turns, (set(), set()))
        change(store, remove, add)
        present = (present - remove) | add
        always &= present
        ever |= add
    assert seen == sorted(set(seen))
    assert always <= set(seen) <= ever


def test_a_page_is_bounded_in_bytes(store: Store) -> None:
    def fill(row: Row) -> None:
        for number in range(4):
            row.put(b"z%d" % number, bytes(MAX_PAGE_BYTES // 2), db=store.table("things"))

    store.submit(fill).result(10)
    with store.reading() as row:
        page, following = read_page(row, store.table("things"), b"z", b"", 100)
        assert len(page) == 2
        assert following is not None
        page, following = read_page(row, store.table("things"), b"z", following, 100)
    assert (len(page), following) == (2, None)


@pytest.fixture(scope="module")
def tokens(store: Store) -> PageTokens:
    return PageTokens(store)


@given(st.binary(min_size=1, max_size=64))
def test_tokens_give_their_position_back(tokens: PageTokens, position: bytes) -> None:
    assert tokens.decode("kernels:", tokens.encode("kernels:", position)) == position


def test_tokens_outlive_their_server(store: Store, tokens: PageTokens) -> None:
    assert PageTokens(store).decode("kernels:", tokens.encode("kernels:", b"a")) == b"a"


@settings(max_examples=200)
@given(st.data())
def test_any_changed_character_is_found(tokens: PageTokens, data: st.DataObject) -> None:
    token = tokens.encode("kernels:", data.draw(st.binary(min_size=1, max_size=40)))
    alphabet = string.ascii_letters + string.digits + "-_="
    place = data.draw(st.integers(0, len(token)))
    changed = data.draw(
        st.sampled_from(
            [
                token[:place] + data.draw(st.sampled_from(alphabet)) + token[place + 1 :],
                token[:place],
                token[:place] + data.draw(st.sampled_from(alphabet)) + token[place:],
            ]
        )
    )
    assume(changed not in ("", token))
    with pytest.raises(ServiceError) as caught:
        tokens.decode("kernels:", changed)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


@pytest.mark.parametrize("token", ["x", "AAAA", "%%%%", "a" * 2000, "\N{BULLET}", "\n", " "])
def test_what_is_no_token_is_refused(tokens: PageTokens, token: str) -> None:
    with pytest.raises(ServiceError) as caught:
        tokens.decode("kernels:", token)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


def test_tokens_of_another_list_or_store_are_refused(tokens: PageTokens, tmp_path: Path) -> None:
    other = Store(tmp_path, Schema((), version=1))
    for token in (
        tokens.encode("blueprints:", b"\x01" * 32),
        PageTokens(other).encode("kernels:", b"\x01" * 32),
    ):
        with pytest.raises(ServiceError):
            tokens.decode("kernels:", token)
    other.close()
