"""Prometheus metrics of a real server, scraped over HTTP."""

import os
import re
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from esper.common.rpc import RpcError
from esper.oona.admin import LogAdmin
from esper.plane import connect
from esper.services.serving import metrics
from esper.services.serving.context import StartupError
from esper.urza.admin import StoreAdmin


def scrape(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def metrics_port(log: Path) -> int:
    match = re.search(r"metrics on port (\d+)", log.read_text())
    assert match
    return int(match.group(1))


def test_calls_and_writes_are_counted(start_server) -> None:
    server = start_server("urza", "oona", metrics="127.0.0.1:0")
    port = metrics_port(server.log)
    with connect(server.address, timeout_s=60) as plane:
        before = scrape(port)
        for _ in range(3):
            plane.urza.write_blob(os.urandom(10))
        with pytest.raises(RpcError):
            plane.urza.get_kernel("kernels/" + 64 * "0")
        service = "/esper.urza.v1"
        missing = ("esper_calls_total", ("NOT_FOUND", f"{service}.LibraryService/GetKernel"))
        deadline_s = time.monotonic() + 60
        while missing not in (after := scrape(port)):  # counted once the answer is out
            assert time.monotonic() < deadline_s
        digest = plane.urza.write_blob(bytes(100_000))
        (server.data / "urza/blobs/files" / digest.hash[:2] / digest.hash).write_bytes(b"damaged")
        with pytest.raises(RpcError, match="DATA_LOSS"):
            plane.urza.read_blob(digest)
        admin = StoreAdmin(plane.channel("urza"))
        admin.collect_garbage(0)
        admin.backup(server.data.parent / "backup")
        LogAdmin(plane.channel("oona")).backup(server.data.parent / "log")
        kept = os.urandom(200_000)
        plane.urza.read_blob(plane.urza.write_blob(kept))
        last = scrape(port)
    assert (after["esper_blobs", ()], after["esper_blob_bytes", ()]) == (3, 30)
    assert last["esper_quarantined_total", ("blob",)] == 1
    assert last["esper_garbage_bytes_total", ()] == 30
    assert (last["esper_blobs", ()], last["esper_blob_bytes", ()]) == (1, len(kept))
    assert last["esper_blob_transferred_bytes_total", ("written",)] == 30 + 100_000 + len(kept)
    assert last["esper_blob_transferred_bytes_total", ("read",)] == len(kept)
    for store in ("urza", "oona"):
        assert last["esper_store_copy_seconds_count", (store,)] == 1
        assert last["esper_store_growths_total", (store,)] == 0
    assert after[missing] == 1
    assert after["esper_calls_running", ()] == 0
    assert after["esper_calls_total", ("OK", f"{service}.BlobService/WriteBlob")] == 3
    assert after["esper_call_seconds_count", (f"{service}.BlobService/WriteBlob",)] == 3
    committed = ("esper_store_writes_total", ("committed", "urza"))
    assert after[committed] - before[committed] >= 3
    assert after["esper_store_commit_seconds_count", ("urza",)] > 0
    assert after["esper_store_row_file_bytes", ("urza",)] > 0


@pytest.mark.parametrize("address", ["9464", ":9464", "127.0.0.1:", "127.0.0.1:x", "h:99999"])
def test_a_senseless_address_is_refused(address: str) -> None:
    with pytest.raises(StartupError, match="metrics"):
        metrics.expose(address)
