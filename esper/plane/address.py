"""Addresses of planes: `unix:PATH` or `HOST:PORT`, and where the defaults are."""

import ipaddress
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux, less its final zero


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        socket: Absolute path of the Unix socket; None for TCP.
        host: Host name or IP address; empty for a Unix socket.
        port: TCP port; 0 asks for a free one and is also the value for a Unix socket.
    """

    socket: Path | None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.socket is not None:
            return f"unix:{self.socket}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.socket is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: it may resolve to anything
            return False


def parse_address(text: str) -> Address:
    """Returns the address that `text` names.

    Args:
        text: `unix:PATH` (made absolute) or `HOST:PORT`; an IPv6 host stands in brackets.

    Raises:
        ValueError: With what is wrong, naming `text`.
    """
    if text.startswith("unix:"):
        name = text.removeprefix("unix:")
        if name.startswith("//"):
            name = name.removeprefix("//")
        if not name or name.endswith("/"):
            raise ValueError(f"address {text!r} names no socket file: it must be unix:PATH")
        path = Path(os.path.abspath(os.path.expanduser(name)))
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"address {text!r} is too long for a Unix socket: its absolute path must have at "
                f"most {MAX_SOCKET_PATH_BYTES} bytes"
            )
        return Address(path)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host or "]" in host:
        host = ""
    if not colon or not host or "/" in host or any(character.isspace() for character in host):
        raise ValueError(f"address {text!r} must be unix:PATH or HOST:PORT")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"address {text!r} has the port {port!r}, which must be 0 to 65535")
    return Address(None, host, int(port))


def default_address() -> str:
    """Returns the address used where none is given.

    It is `ESPER_PLANE` where that is set, else a socket in a directory of this user alone, under
    `XDG_RUNTIME_DIR` or the directory for temporary files.
    """
    named = os.environ.get("ESPER_PLANE")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return f"unix:{Path(runtime) / f'esper-{os.getuid()}' / 'plane.sock'}"


def default_data_dir() -> Path:
    """Returns the directory of the stores where none is given: `esper` under `XDG_DATA_HOME`."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "esper"
