"""A store of the first schema becomes one of today."""

import asyncio
from pathlib import Path

from urza_samples import new_kernel

from esper import blueprints
from esper.services.store.engine import Store
from esper.services.store.opening import Row
from esper.services.store.seals import unseal
from esper.services.urza.blobs import BlobStore
from esper.services.urza.contents import SCHEMA
from esper.services.urza.library import Library
from esper.services.urza.resources import digest_of_blueprint
from esper.services.urza.resources import digest_of_kernel
from esper.urza.v1 import library_pb2 as pb

NEW_TABLES = ("blueprint_index", "kernel_index", "lineage", "changes")


def open_library(folder: Path) -> tuple[Store, Library]:
    store = Store(folder, SCHEMA)
    return store, Library(store, BlobStore(store, folder / "blobs"))


async def fill(library: Library) -> str:
    """Stores a few kernels, one of them with reports, and returns its name."""
    blueprint = blueprints.get("affine")
    await asyncio.wrap_future(
        library.create_blueprint(
            pb.CreateBlueprintRequest(blueprint=blueprint), digest_of_blueprint(blueprint)
        )
    )
    name = ""
    for number in range(5):
        kernel = new_kernel("affine")
        request = pb.CreateKernelRequest(kernel=kernel, tags=[f"tag-{number % 2}"])
        created = library.create_kernel(request, digest_of_kernel(kernel))
        name = (await asyncio.wrap_future(created)).kernel.name
    for gain in (0.5, None, 1.0):
        report = pb.FieldReport(kernel=name, run="r", verdict=pb.FIELD_VERDICT_CULLED, gain=gain)
        request = pb.RecordFieldReportRequest(report=report)
        await asyncio.wrap_future(library.record_field_report(request))
    return name


def make_old(store: Store) -> None:
    """Takes out what the first schema did not have, and puts back its counters of reports."""

    def work(row: Row) -> None:
        for name in NEW_TABLES:
            row.drop(store.table(name), delete=False)
        row.delete(b"change_bytes", db=store.table("counters"))
        for key, value in list(row.cursor(db=store.table("kernels"))):
            record = pb.KernelRecord.FromString(value)
            record.ClearField("parents")
            record.ClearField("mean_gain")
            record.ClearField("num_gains")
            row.put(key, record.SerializeToString(), db=store.table("kernels"))
            row.put(b"reports" + key, (3).to_bytes(8, "big"), db=store.table("counters"))
        reports = store.table("reports")
        for key, value in list(row.cursor(db=reports)):
            row.put(key, unseal(key, value) or b"", db=reports)
        row.put(b"schema_version", b"1", db=store.table("meta"))

    store.submit(work).result(10)


def listed(library: Library) -> list[list[pb.KernelRecord]]:
    questions = [
        pb.ListKernelsRequest(),
        pb.ListKernelsRequest(filter=pb.KernelFilter(tags=["tag-1"])),
        pb.ListKernelsRequest(order=pb.KERNEL_ORDER_PARAMETER_COUNT),
        pb.ListKernelsRequest(order=pb.KERNEL_ORDER_MEAN_GAIN),
    ]
    return [list(library.list_kernels(question).kernels) for question in questions]


def test_indexes_lineage_and_gains_are_drawn_up(tmp_path: Path) -> None:
    async def work() -> None:
        store, library = open_library(tmp_path)
        name = await fill(library)
        lists = listed(library)
        assert [len(records) for records in lists] == [5, 2, 5, 1]
        family = library.lineage(name, 2)
        tagged = library.list_blueprints(pb.ListBlueprintsRequest())
        revision = library.revision()
        make_old(store)
        store.close()

        store, library = open_library(tmp_path)
        assert listed(library) == lists
        assert library.lineage(name, 2) == family
        assert library.list_blueprints(pb.ListBlueprintsRequest()) == tagged
        assert library.get_kernel(name).mean_gain == 0.75
        reports = library.list_field_reports(pb.ListFieldReportsRequest(kernel=name)).reports
        assert [report.gain for report in reports] == [0.5, 0.0, 1.0]
        assert library.revision() == revision
        assert library.changes.read(revision + 1) == []
        report = pb.FieldReport(kernel=name, run="r", verdict=pb.FIELD_VERDICT_CULLED)
        request = pb.RecordFieldReportRequest(report=report)
        stored = await asyncio.wrap_future(library.record_field_report(request))
        assert stored.report.name == f"{name}/reports/3"
        (change,) = library.changes.read(revision + 1)
        assert change.report == stored.report
        store.close()

    asyncio.run(work())
