"""What the shell gives a service, and what it expects of one."""

import asyncio
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Protocol
from typing import TypeAlias

import grpc

from esper.services.store.limits import StoreLimits

# Quoted: gRPC's class is generic in its type stubs alone.
CallContext: TypeAlias = "grpc.aio.ServicerContext[object, object]"
"""The context that a servicer's method gets."""


@dataclass(frozen=True)
class ServiceContext:
    """Where a service lives.

    Attributes:
        data_dir: Directory of the server's stores; a service uses `data_dir / <its name>`.
        urza: Address of the Urza that Tezzeret and Tamiyo use; the shell fills in its own address
            where none is given.
        stopping: Set when the server begins to drain; calls that follow something for ever end
            then.
        limits: How much each store may take.
    """

    data_dir: Path
    urza: str | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    limits: StoreLimits = StoreLimits()


class Service(Protocol):
    """One of the plane's services."""

    @property
    def full_names(self) -> tuple[str, ...]:
        """Full names of the gRPC services that it serves."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers its servicers."""

    async def close(self) -> None:
        """Releases everything; called once, after the last call has ended."""


class StartupError(Exception):
    """A reason not to start, in one sentence for the operator."""
