"""How much is stored."""

from esper.services.store.files import free_bytes
from esper.services.urza.blobs import QUARANTINE_TABLE as BLOBS_ASIDE
from esper.services.urza.contents import SCHEMA
from esper.services.urza.contents import Contents
from esper.services.urza.records import QUARANTINE_TABLE as ROWS_ASIDE
from esper.urza.v1 import store_pb2 as pb


def read_stats(contents: Contents) -> pb.GetStoreStatsResponse:
    """Returns how much is stored, and how much room there is."""
    store, room = contents.store, contents.blobs.room
    sizes = store.table_sizes()
    return pb.GetStoreStatsResponse(
        directory=str(store.directory),
        schema_version=SCHEMA.version,
        tables=[pb.TableStats(name=name, num_rows=number) for name, number in sizes.items()],
        num_blobs=room.num_stored,
        blob_bytes=room.stored_bytes,
        max_blob_bytes=store.limits.max_blob_bytes,
        num_quarantined=sizes[BLOBS_ASIDE] + sizes[ROWS_ASIDE],
        row_file_bytes=store.row_file_bytes,
        max_row_bytes=store.limits.max_row_bytes,
        free_bytes=free_bytes(store.directory),
        keep_free_bytes=store.limits.keep_free_bytes,
        num_queued=store.num_queued,
    )
