"""Client for who looks after a running Oona."""

from collections.abc import Iterator
from pathlib import Path

import grpc

from esper.common.backup import BackupWriter
from esper.common.rpc import readable_errors
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc

LONG_CALL_TIMEOUT_S = 24 * 3600.0


class LogAdmin:
    """What an operator does with a running log.

    Every call raises `esper.common.rpc.RpcError` where the server refuses it or does not answer.

    Args:
        channel: An open channel to a server of Oona.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = event_pb2_grpc.EventServiceStub(channel)

    def check(self, *, quarantine: bool = False) -> Iterator[event_pb2.CheckLogResponse]:
        """Yields what is wrong, and a summary last.

        Args:
            quarantine: Whether damaged events are moved aside.
        """
        request = event_pb2.CheckLogRequest(quarantine=quarantine)
        with readable_errors():
            yield from self._stub.CheckLog(request, timeout=LONG_CALL_TIMEOUT_S)

    def backup(self, folder: Path) -> dict[str, object]:
        """Writes a backup to a folder of this machine and returns its manifest.

        Args:
            folder: A new one, or that of an earlier backup, which is replaced.

        Raises:
            BackupError: Where `folder` cannot take it.
        """
        writer = BackupWriter(folder, "oona")
        with readable_errors():
            pieces = self._stub.BackupLog(event_pb2.BackupLogRequest(), timeout=LONG_CALL_TIMEOUT_S)
            writer.put_rows(piece.rows for piece in pieces)
        return writer.finish()
