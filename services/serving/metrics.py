"""What a server counts for Prometheus; kept always, shown on `/metrics` where so asked."""

import prometheus_client
from prometheus_client import Counter
from prometheus_client import Gauge
from prometheus_client import Histogram

from esper.services.serving.context import StartupError

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)

CALLS = Counter("esper_calls", "Calls that have ended.", ["method", "code"])
CALL_SECONDS = Histogram(
    "esper_call_seconds", "How long calls took, streams included.", ["method"], buckets=_SECONDS
)
CALLS_RUNNING = Gauge("esper_calls_running", "Calls under way.")
WRITES = Counter("esper_store_writes", "Writes committed or refused.", ["store", "outcome"])
COMMIT_SECONDS = Histogram(
    "esper_store_commit_seconds",
    "How long a group of writes took from its first write to its sync.",
    ["store"],
    buckets=_SECONDS,
)
READ_SECONDS = Histogram(
    "esper_store_read_seconds", "How long reads held a snapshot.", ["store"], buckets=_SECONDS
)
COPY_SECONDS = Histogram(
    "esper_store_copy_seconds",
    "How long copies of the rows took, for backups and checks.",
    ["store"],
    buckets=_SECONDS,
)
GROWTHS = Counter("esper_store_growths", "How often the map of the rows was enlarged.", ["store"])
ROW_FILE_BYTES = Gauge("esper_store_row_file_bytes", "Size of the file with the rows.", ["store"])
READ_AHEAD_BYTES = Gauge(
    "esper_store_read_ahead_bytes",
    "How much of the file with the rows was read into memory at the opening.",
    ["store"],
)
QUEUE_LENGTH = Gauge("esper_store_queued_writes", "Writes that wait for the writer.", ["store"])
BLOBS = Gauge("esper_blobs", "Blobs stored.")
BLOB_BYTES = Gauge("esper_blob_bytes", "Size of the blobs stored.")
TRANSFERRED = Counter(
    "esper_blob_transferred_bytes", "Bytes of blobs `written` and `read` by callers.", ["direction"]
)
GARBAGE_BYTES = Counter("esper_garbage_bytes", "Size of the blobs that were collected as garbage.")
QUARANTINED = Counter("esper_quarantined", "Damaged things that were put aside.", ["kind"])


def expose(address: str) -> int:
    """Serves `/metrics` over HTTP from a thread, and returns the port.

    Args:
        address: `HOST:PORT`; port 0 takes a free one.

    Raises:
        StartupError: For an address that makes no sense or is in use.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise StartupError(f"--metrics is {address!r}, but it must be HOST:PORT")
    try:
        server, _ = prometheus_client.start_http_server(int(port), host)
    except (OSError, OverflowError) as error:
        raise StartupError(f"cannot serve metrics on {address}: {error}") from error
    return int(server.server_port)
