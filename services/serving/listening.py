"""Takes a listening address, without robbing a live server of it."""

import os
import socket
import stat

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


def prepare_socket(address: Address) -> None:
    """Makes way for a Unix socket: creates its directory and removes what a dead server left.

    Raises:
        StartupError: Where a live server holds the socket, where another kind of file stands there,
            or where the directory belongs to another user or cannot be made.
    """
    if address.socket is None:
        return
    folder = address.socket.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        found = address.socket.lstat().st_mode if os.path.lexists(address.socket) else None
    except OSError as error:
        raise StartupError(f"cannot use {folder} for the socket: {error.strerror}") from error
    # A directory of a predictable name under /tmp may have been made by someone else to read along.
    if folder.name.startswith("esper-") and owner != os.getuid():
        raise StartupError(f"{folder} belongs to user {owner}: choose another --listen")
    if found is None:
        return
    if not stat.S_ISSOCK(found):
        raise StartupError(f"{address.socket} exists and is not a socket")
    if is_live(address):
        raise StartupError(f"{address} is in use by a running server")
    try:
        address.socket.unlink()
    except OSError as error:
        raise StartupError(f"cannot replace {address.socket}: {error.strerror}") from error


def is_live(address: Address) -> bool:
    """Returns whether a process accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(address.socket))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full backlog or another user's socket: somebody is there
            return True
        return True


def bind(server: grpc.aio.Server, address: Address) -> Address:
    """Binds `server` and returns the address with the port that was taken.

    Raises:
        StartupError: Where the address is in use or not ours to take.
    """
    prepare_socket(address)
    try:
        port = server.add_insecure_port(str(address))
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address}: it is in use, or not an address of this machine, or "
            "needs more rights"
        ) from error
    if address.socket is not None:
        return address
    return Address(None, address.host, port)
