from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.common.v1 import digest_pb2
from esper.services.serving.errors import ServiceError
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.opening import Schema
from esper.services.store.paging import SCAN_ROWS
from esper.services.store.paging import decode_token
from esper.services.store.paging import encode_token
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


def keep_even(value: bytes) -> digest_pb2.Digest | None:
    digest = digest_pb2.Digest.FromString(value)
    return digest if digest.size_bytes % 2 == 0 else None


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
    after = b""
    turns = iter(changes)
    while True:
        page, last = read_page(store, "things", b"p", after, size, keep_even)
        assert len(page) <= size
        seen += [digest.hash.encode() for digest in page]
        if last is None:
            break
        assert last == seen[-1]
        after = last
        remove, add = next(turns, (set(), set()))
        change(store, remove, add)
        present = (present - remove) | add
        always &= present
        ever |= add
    assert seen == sorted(set(seen))
    assert {key for key in always if len(key) % 2 == 0} <= set(seen)
    assert set(seen) <= {key for key in ever if len(key) % 2 == 0}


def test_a_sparse_match_is_found_beyond_one_scan(store: Store) -> None:
    keys = {f"p{number:05}".encode() for number in range(3 * SCAN_ROWS)}
    wanted = {b"pz1", b"pz2x2"}
    change(store, set(), keys | wanted, clear=True)

    def keep(value: bytes) -> digest_pb2.Digest | None:
        digest = digest_pb2.Digest.FromString(value)
        return digest if digest.hash.encode() in wanted else None

    page, last = read_page(store, "things", b"p", b"", 1, keep)
    assert ([digest.hash for digest in page], last) == (["pz1"], b"pz1")
    page, last = read_page(store, "things", b"p", b"pz1", 1, keep)
    assert ([digest.hash for digest in page], last) == (["pz2x2"], None)


@given(st.binary(min_size=1, max_size=64))
def test_tokens_give_their_key_back(key: bytes) -> None:
    assert decode_token("kernels:", encode_token("kernels:", key)) == key


GOOD = encode_token("kernels:", b"\x01" * 32)


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "AAAA",
        GOOD[:-4],
        "B" + GOOD[1:],
        GOOD + "====",
        GOOD + "%",
        "a" * 2000,
        "\N{BULLET}",
        encode_token("blueprints:", b"\x01" * 32),
        encode_token("kernels:", b""),
    ],
)
def test_foreign_tokens_are_refused(token: str) -> None:
    if token == GOOD[:-4]:  # a shorter key is a position too
        assert len(decode_token("kernels:", token)) < 32
        return
    with pytest.raises(ServiceError) as caught:
        decode_token("kernels:", token)
    assert caught.value.violations[0].field == "page_token"
