"""Takes a listening address, without robbing a live server of it."""

import errno
import os
import socket
import stat
from pathlib import Path

import grpc

from esper.plane.address import Address
from esper.services.serving.context import StartupError

PROBE_TIMEOUT_S = 1.0


def refuse_open_network(address: Address, insecure: bool) -> None:
    """Raises StartupError where other machines could reach an unprotected server by accident."""
    if not address.is_local and not insecure:
        raise StartupError(
            f"{address} can be reached from other machines and this release does not serve TLS: "
            "listen on a loopback address or a Unix socket, or pass --insecure to accept plain text"
        )


def prepare_socket(path: Path) -> None:
    """Makes way for a Unix socket: creates its directory and removes what a dead server left.

    Raises:
        StartupError: Where a live server holds the socket, where another kind of file stands there,
            or where the directory belongs to another user or cannot be made.
    """
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        found = path.lstat().st_mode if os.path.lexists(path) else None
    except OSError as error:
        raise StartupError(f"cannot use {folder} for the socket: {error.strerror}") from error
    # A directory of a predictable name under /tmp may have been made by someone else to read along.
    if folder.name.startswith("esper-") and owner != os.getuid():
        raise StartupError(f"{folder} belongs to user {owner}: choose another --listen")
    if found is None:
        return
    if not stat.S_ISSOCK(found):
        raise StartupError(f"{path} exists and is not a socket")
    if is_live(path):
        raise StartupError(f"unix:{path} is in use by a running server")
    try:
        path.unlink()
    except OSError as error:
        raise StartupError(f"cannot replace {path}: {error.strerror}") from error


def is_live(path: Path) -> bool:
    """Returns whether a process accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full backlog or another user's socket: somebody is there
            return True
        return True


def probe_port(address: Address) -> None:
    """Makes sure that a TCP port can be had; gRPC would only say that it cannot.

    Raises:
        StartupError: With the system's reason.
    """
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in places:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise StartupError(f"cannot listen on {address}: {reason}") from error


def bind(server: grpc.aio.Server, address: Address) -> Address:
    """Binds `server` and returns the address with the port that was taken.

    Raises:
        StartupError: Where the address is in use or not ours to take.
    """
    if address.socket is None:
        probe_port(address)
    else:
        prepare_socket(address.socket)
    try:
        port = server.add_insecure_port(str(address))
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address}: {error}") from error
    if address.socket is not None:
        return address
    return Address(None, address.host, port)
