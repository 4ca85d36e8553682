"""Client for who looks after a running Urza."""

from collections.abc import Iterator
from pathlib import Path

import grpc

from esper.common.backup import BackupWriter
from esper.common.rpc import CALL_TIMEOUT_S
from esper.common.rpc import readable_errors
from esper.urza.client import UrzaClient
from esper.urza.v1 import store_pb2
from esper.urza.v1 import store_pb2_grpc

LONG_CALL_TIMEOUT_S = 24 * 3600.0


class StoreAdmin:
    """What an operator does with a running store.

    Every call raises `esper.common.rpc.RpcError` where the server refuses it or does not answer.

    Args:
        channel: An open channel to a server of Urza.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)
        self._urza = UrzaClient(channel)

    def stats(self) -> store_pb2.GetStoreStatsResponse:
        """Returns how much is stored."""
        with readable_errors():
            return self._stub.GetStoreStats(
                store_pb2.GetStoreStatsRequest(), timeout=CALL_TIMEOUT_S
            )

    def check(self, *, quarantine: bool = False) -> Iterator[store_pb2.CheckStoreResponse]:
        """Yields what is wrong, and a summary last.

        Args:
            quarantine: Whether what is damaged is moved aside.
        """
        request = store_pb2.CheckStoreRequest(quarantine=quarantine)
        with readable_errors():
            yield from self._stub.CheckStore(request, timeout=LONG_CALL_TIMEOUT_S)

    def collect_garbage(
        self, grace_s: float | None = None, *, dry_run: bool = False
    ) -> store_pb2.CollectGarbageResponse:
        """Removes what nothing refers to.

        Args:
            grace_s: What was used within so many seconds stays; default an hour.
            dry_run: Only count.
        """
        request = store_pb2.CollectGarbageRequest(dry_run=dry_run)
        if grace_s is not None:
            request.grace.FromNanoseconds(round(grace_s * 1e9))
        with readable_errors():
            return self._stub.CollectGarbage(request, timeout=LONG_CALL_TIMEOUT_S)

    def backup(self, folder: Path) -> dict[str, object]:
        """Writes a backup to a folder of this machine and returns its manifest.

        Args:
            folder: A new one, or that of an earlier backup, which is brought up to date.

        Raises:
            BackupError: Where `folder` cannot take it.
        """
        writer = BackupWriter(folder, "urza")
        with readable_errors():
            parts = self._stub.BackupStore(
                store_pb2.BackupStoreRequest(), timeout=LONG_CALL_TIMEOUT_S
            )
            try:
                first: list[store_pb2.BackupStoreResponse] = []
                writer.put_rows(_rows(parts, first))
                for part in (*first, *_until_complete(parts, first)):
                    if part.HasField("blob") and writer.wants(part.blob):
                        writer.put_blob(part.blob, [self._urza.read_blob(part.blob)])
            finally:
                parts.cancel()
        return writer.finish()


def _rows(
    parts: Iterator[store_pb2.BackupStoreResponse], first: list[store_pb2.BackupStoreResponse]
) -> Iterator[bytes]:
    """Yields the rows; puts the part behind them into `first`."""
    for part in parts:
        if not part.HasField("rows"):
            first.append(part)
            return
        yield part.rows


def _until_complete(
    parts: Iterator[store_pb2.BackupStoreResponse], first: list[store_pb2.BackupStoreResponse]
) -> Iterator[store_pb2.BackupStoreResponse]:
    """Yields the parts up to the last, which `first` may have been."""
    last = first[-1]
    while not last.complete:
        last = next(parts)
        yield last
