"""How stores of former schema versions become those of the next."""

from collections.abc import Callable

from esper.services.store.opening import Database
from esper.services.store.opening import Row
from esper.services.store.seals import seal_rows
from esper.services.urza.catalog import blueprint_entries
from esper.services.urza.catalog import kernel_entries
from esper.services.urza.etags import etag_of
from esper.services.urza.lineage import TABLE as LINEAGE_TABLE
from esper.services.urza.lineage import rows_of
from esper.urza.v1 import library_pb2 as pb


def from_1(row: Row, table: Callable[[str], Database]) -> None:
    """Draws up the indexes, the lineage and the mean gains, which version 1 did not have.

    The etags are made anew, as they have a digest of the record in them since.

    The log of changes begins anew: what came before is compacted.
    """
    blueprints, kernels = table("blueprints"), table("kernels")
    for key in [key for key, _ in row.cursor(db=blueprints)]:
        blueprint = pb.BlueprintRecord.FromString(row.get(key, db=blueprints) or b"")
        blueprint.etag = etag_of(blueprint)
        row.put(key, blueprint.SerializeToString(), db=blueprints)
        for entry in blueprint_entries(blueprint):
            row.put(entry, b"", db=table("blueprint_index"))
    for key in [key for key, _ in row.cursor(db=kernels)]:
        record = pb.KernelRecord.FromString(row.get(key, db=kernels) or b"")
        record.parents.append(f"blueprints/{record.kernel.blueprint_digest}")
        gains = [
            report.gain
            for report in _reports(row, table("reports"), key)
            if report.HasField("gain")
        ]
        if gains:
            record.num_gains = len(gains)
            record.mean_gain = sum(gain / len(gains) for gain in gains)
        record.etag = etag_of(record)
        row.put(key, record.SerializeToString(), db=kernels)
        for entry in kernel_entries(record):
            row.put(entry, b"", db=table("kernel_index"))
        for edge in rows_of(record.name, record.parents[0]):
            row.put(edge, b"", db=table(LINEAGE_TABLE))
        # The next number of a kernel's reports is read from the last one.
        row.delete(b"reports" + key, db=table("counters"))


def from_2(row: Row, table: Callable[[str], Database]) -> None:
    """Gives the reports a checksum each."""
    seal_rows(row, table("reports"))


def _reports(row: Row, reports: Database, kernel: bytes) -> list[pb.FieldReport]:
    found = []
    cursor = row.cursor(db=reports)
    going_on = cursor.set_range(kernel)
    while going_on and cursor.key().startswith(kernel):
        found.append(pb.FieldReport.FromString(cursor.value()))
        going_on = cursor.next()
    return found
