"""Who was made from whom, among blueprints and kernels."""

from collections.abc import Iterator

from esper.services.serving.errors import precondition
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.urza.v1 import library_pb2 as pb

TABLE = "lineage"
MAX_EDGES = 1000

_COLLECTIONS = {b"b": "blueprints", b"k": "kernels"}
_TO_PARENTS = b"p"
_TO_CHILDREN = b"c"


class Lineage:
    """The edges between the records of one library.

    Edges are only drawn when a record is first stored, to records that are stored already, so
    there is no way round to itself.

    Args:
        store: Holds `TABLE`, and the tables of the records.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._table = store.table(TABLE)

    def add(self, row: Row, child: str, parents: list[str]) -> None:
        """Draws the edges of a new record.

        Raises:
            ServiceError: FAILED_PRECONDITION where a parent is not stored.
        """
        for parent in parents:
            collection, _, digest = parent.partition("/")
            if row.get(bytes.fromhex(digest), db=self._store.table(collection)) is None:
                raise precondition("NO_PARENT", f"{parent} is not stored", name=parent)
            for key in rows_of(child, parent):
                row.put(key, b"", db=self._table)

    def around(self, row: Row, name: str, depth: int) -> pb.GetLineageResponse:
        """Returns the edges within `depth` generations of a record."""
        response = pb.GetLineageResponse()
        for edges, direction in (
            (response.ancestors, _TO_PARENTS),
            (response.descendants, _TO_CHILDREN),
        ):
            for near, far, generation in self._walk(row, direction, _reference(name), depth):
                if len(edges) == MAX_EDGES:
                    response.truncated = True
                    break
                child, parent = (near, far) if direction == _TO_PARENTS else (far, near)
                edges.add(parent=_name(parent), child=_name(child), generation=generation)
        return response

    def _walk(
        self, row: Row, direction: bytes, start: bytes, depth: int
    ) -> Iterator[tuple[bytes, bytes, int]]:
        """Yields the edges in one direction, each once: near end, far end, generation."""
        known = {start}
        generation = [start]
        for number in range(1, depth + 1):
            following: list[bytes] = []
            for near in generation:
                prefix = direction + near
                cursor = row.cursor(db=self._table)
                going_on = cursor.set_range(prefix)
                while going_on and cursor.key().startswith(prefix):
                    far = cursor.key()[len(prefix) :]
                    yield near, far, number
                    if far not in known:
                        known.add(far)
                        following.append(far)
                    going_on = cursor.next()
            generation = following


def rows_of(child: str, parent: str) -> tuple[bytes, bytes]:
    """Returns the keys of the rows of one edge."""
    near, far = _reference(child), _reference(parent)
    return _TO_PARENTS + near + far, _TO_CHILDREN + far + near


def _reference(name: str) -> bytes:
    collection, _, digest = name.partition("/")
    return collection[:1].encode() + bytes.fromhex(digest)


def _name(reference: bytes) -> str:
    return f"{_COLLECTIONS[reference[:1]]}/{reference[1:].hex()}"
