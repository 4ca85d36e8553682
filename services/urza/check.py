"""The check of a store: everything is read, digests and chains are recomputed, references followed.

It runs beside whatever else goes on: what looks wrong from one snapshot to the next is looked at
again in one.
"""

import logging
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message

from esper.common.v1 import check_pb2
from esper.common.v1 import digest_pb2
from esper.services.serving.errors import ServiceError
from esper.services.store.copies import copied_rows
from esper.services.store.copies import structure_problems
from esper.services.store.requests import check_requests
from esper.services.store.seals import unseal
from esper.services.urza.blobs import TABLE as BLOB_TABLE
from esper.services.urza.blobs import blob_name
from esper.services.urza.blobs import row_size
from esper.services.urza.contents import Contents
from esper.services.urza.etags import etag_of
from esper.services.urza.garbage import orphans
from esper.services.urza.library import report_name
from esper.services.urza.lineage import TABLE as LINEAGE_TABLE
from esper.services.urza.lineage import rows_of
from esper.services.urza.resources import digest_of_blueprint
from esper.services.urza.resources import digest_of_kernel
from esper.urza.v1 import library_pb2
from esper.urza.v1 import run_pb2
from esper.urza.v1 import store_pb2 as pb

LOG = logging.getLogger("esper.urza.check")

M = TypeVar("M", bound=Message)
R = TypeVar("R", library_pb2.BlueprintRecord, library_pb2.KernelRecord)

_KEY_BYTES = 8


class Checker:
    """One check of a store.

    Args:
        contents: What is stored.
        quarantine: Whether damaged blobs and records are put into quarantine.
    """

    def __init__(self, contents: Contents, *, quarantine: bool = False) -> None:
        self._contents = contents
        self._store = contents.store
        self._blobs = contents.blobs
        self._quarantine = quarantine
        self._summary = pb.CheckSummary()

    def __iter__(self) -> Generator[pb.CheckStoreResponse, None, None]:
        """Yields what is wrong, and the summary at the end; blocks in between."""
        parts: tuple[Callable[[], Iterator[check_pb2.Finding]], ...] = (
            self._structure,
            self._check_blobs,
            self._orphans,
            self._check_records,
            self._changes,
            self._reports,
            self._check_runs,
            self._requests,
        )
        for part in parts:
            for finding in part():
                if finding.kind == check_pb2.FINDING_KIND_ORPHAN:
                    self._summary.num_orphans += 1
                else:
                    self._summary.num_problems += 1
                yield pb.CheckStoreResponse(finding=finding)
        yield pb.CheckStoreResponse(summary=self._summary)

    # ------------------------------------------------------------ the file with the rows

    def _structure(self) -> Iterator[check_pb2.Finding]:
        with copied_rows(self._store, compact=False) as folder:
            if folder is None:
                LOG.warning("no room for a copy of the rows: their structure is not checked")
                return
            problems = structure_problems(folder)
        self._summary.structure_checked = True
        for problem in problems:
            yield check_pb2.Finding(
                kind=check_pb2.FINDING_KIND_STRUCTURE, name="rows", detail=problem
            )

    # ------------------------------------------------------------ blobs

    def _check_blobs(self) -> Iterator[check_pb2.Finding]:
        for key, value in self._store.scan(BLOB_TABLE):
            digest = digest_pb2.Digest(hash=key.hex(), size_bytes=row_size(value))
            try:
                sound = self._blobs.is_sound(digest)
            except ServiceError:  # removed meanwhile
                continue
            self._summary.num_blobs += 1
            self._summary.blob_bytes += digest.size_bytes
            if not sound:
                if self._quarantine:
                    self._blobs.put_aside(digest)
                yield check_pb2.Finding(
                    kind=check_pb2.FINDING_KIND_DAMAGED,
                    name=blob_name(digest),
                    detail="its bytes are not those of its digest",
                    quarantined=self._quarantine,
                )

    def _orphans(self) -> Iterator[check_pb2.Finding]:
        for path in orphans(self._store, self._blobs):
            if self._blobs.leases.is_held(path.name):  # an upload that is being entered
                continue
            detail = f"{path} belongs to no blob"
            yield check_pb2.Finding(
                kind=check_pb2.FINDING_KIND_ORPHAN, name=path.name, detail=detail
            )

    # ------------------------------------------------------------ the library

    def _check_records(self) -> Iterator[check_pb2.Finding]:
        library = self._contents.library
        for key, value in self._rows("blueprints"):
            name = f"blueprints/{key.hex()}"
            blueprint = _decoded(library_pb2.BlueprintRecord, value)
            problem = _unsound(
                blueprint, name, lambda record: digest_of_blueprint(record.blueprint)
            )
            if problem:
                aside = self._quarantine and library.blueprints.put_aside(key, value)
                yield _damaged(name, problem, quarantined=aside)
            elif blueprint is not None:
                yield from self._edges(blueprint)
        for key, value in self._rows("kernels"):
            name = f"kernels/{key.hex()}"
            kernel = _decoded(library_pb2.KernelRecord, value)
            problem = _unsound(kernel, name, lambda held: digest_of_kernel(held.kernel))
            if problem:
                aside = self._quarantine and library.kernels.put_aside(key, value)
                yield _damaged(name, problem, quarantined=aside)
            elif kernel is not None:
                yield from self._references(kernel)
                yield from self._edges(kernel)
        for table, records in (("blueprints", library.blueprints), ("kernels", library.kernels)):
            for problem in records.check_index():
                yield check_pb2.Finding(
                    kind=check_pb2.FINDING_KIND_INDEX, name=table, detail=problem
                )

    def _edges(
        self, record: library_pb2.BlueprintRecord | library_pb2.KernelRecord
    ) -> Iterator[check_pb2.Finding]:
        """Edges are drawn with the record and never removed."""
        keys = [key for parent in record.parents for key in rows_of(record.name, parent)]
        lacking = sum(not self._has(LINEAGE_TABLE, key) for key in keys)
        if lacking:
            detail = f"its lineage lacks {lacking} of {len(keys)} rows"
            yield check_pb2.Finding(
                kind=check_pb2.FINDING_KIND_INDEX, name=record.name, detail=detail
            )

    def _changes(self) -> Iterator[check_pb2.Finding]:
        for problem in self._contents.library.changes.check():
            yield check_pb2.Finding(
                kind=check_pb2.FINDING_KIND_INDEX, name="changes", detail=problem
            )

    def _references(self, record: library_pb2.KernelRecord) -> Iterator[check_pb2.Finding]:
        weights = record.kernel.weights
        if record.kernel.HasField("weights") and not self._blobs.contains(weights):
            detail = f"its weights {blob_name(weights)} are not stored"
            yield check_pb2.Finding(
                kind=check_pb2.FINDING_KIND_DANGLING, name=record.name, detail=detail
            )
        for parent in record.parents:
            collection, _, digest = parent.partition("/")
            if not self._has(collection, bytes.fromhex(digest)):
                detail = f"its parent {parent} is not stored"
                yield check_pb2.Finding(
                    kind=check_pb2.FINDING_KIND_DANGLING, name=record.name, detail=detail
                )

    def _reports(self) -> Iterator[check_pb2.Finding]:
        for key, value in self._rows("reports"):
            if not value:  # it was put aside before
                continue
            kernel, name = key[:-_KEY_BYTES], report_name(key)
            content = unseal(key, value)
            report = None if content is None else _decoded(library_pb2.FieldReport, content)
            if report is None or report.name != name:
                aside = self._quarantine and self._contents.library.put_report_aside(key, value)
                yield _damaged(name, "its record is not what was stored", quarantined=aside)
            if not self._has("kernels", kernel):
                detail = "its kernel is not stored"
                yield check_pb2.Finding(
                    kind=check_pb2.FINDING_KIND_DANGLING, name=name, detail=detail
                )

    # ------------------------------------------------------------ runs

    def _check_runs(self) -> Iterator[check_pb2.Finding]:
        for run_id, key in self._rows("run_ids"):
            name = f"runs/{run_id.decode('utf-8', 'replace')}"
            if not self._has("runs", key):
                yield _damaged(name, "its record is missing")
                continue
            try:
                outcome = [step for step in self._contents.runs.verify(name) if step is not None][
                    -1
                ]
            except ServiceError as error:
                yield _damaged(name, error.message)
                continue
            self._summary.num_rows += outcome.num_events
            if not outcome.intact:
                yield _damaged(name, f"its event {outcome.first_broken} does not match the chain")
        for key, value in self._rows("runs"):
            run = _decoded(run_pb2.Run, value)
            run_id = run.name.removeprefix("runs/").encode() if run is not None else b""
            if run is not None and not (run_id and self._has("run_ids", run_id)):
                detail = "it is not to be found under its id"
                yield check_pb2.Finding(
                    kind=check_pb2.FINDING_KIND_INDEX, name=run.name, detail=detail
                )
            elif run is None and not self._is_named(key):
                yield _damaged(f"run {key.hex()}", "its record cannot be read")
        yield from self._stray_events()

    def _is_named(self, key: bytes) -> bool:
        """Returns whether an id stands for the run under `key`; its verification has told then."""
        return any(value == key for _, value in self._store.scan("run_ids"))

    def _stray_events(self) -> Iterator[check_pb2.Finding]:
        """Yields the runs that have events and no record; looks at one event of each."""
        position = b""
        while True:
            with self._store.reading() as row:
                cursor = row.cursor(db=self._store.table("run_events"))
                if not cursor.set_range(position):
                    return
                run = cursor.key()[:_KEY_BYTES]
                stray = row.get(run, db=self._store.table("runs")) is None
            if stray:
                detail = "it has events and no record"
                yield check_pb2.Finding(
                    kind=check_pb2.FINDING_KIND_DANGLING, name=f"run {run.hex()}", detail=detail
                )
            position = run + b"\xff" * (_KEY_BYTES + 1)

    # ------------------------------------------------------------ the rest

    def _requests(self) -> Iterator[check_pb2.Finding]:
        for problem in check_requests(self._store, "requests"):
            yield check_pb2.Finding(
                kind=check_pb2.FINDING_KIND_INDEX, name="requests", detail=problem
            )

    def _rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._store.scan(table):
            self._summary.num_rows += 1
            yield key, value

    def _has(self, table: str, key: bytes) -> bool:
        with self._store.reading() as row:
            return row.get(key, db=self._store.table(table)) is not None


def _decoded(kind: type[M], value: bytes) -> M | None:
    try:
        return kind.FromString(value)
    except DecodeError:
        return None


def _unsound(record: R | None, name: str, digest_of: Callable[[R], str]) -> str:
    """Returns what is wrong with a record, in a sentence; empty for nothing."""
    if record is None or record.name != name or record.etag != etag_of(record):
        return "its record is not what was stored"
    try:
        found = digest_of(record)
    except ServiceError as error:
        return f"its content is unsound: {error.message}"
    return "" if name.endswith(f"/{found}") else f"its content has the digest {found}"


def _damaged(name: str, detail: str, *, quarantined: bool = False) -> check_pb2.Finding:
    return check_pb2.Finding(
        kind=check_pb2.FINDING_KIND_DAMAGED, name=name, detail=detail, quarantined=quarantined
    )
