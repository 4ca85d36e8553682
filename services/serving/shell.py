"""Runs services in one gRPC server: binding, health, reflection, draining."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

import grpc
from grpc_health.v1 import health
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2_grpc

from esper.plane.address import Address
from esper.plane.v1 import plane_pb2_grpc
from esper.services.serving import info
from esper.services.serving import metrics
from esper.services.serving.context import Service
from esper.services.serving.context import ServiceContext
from esper.services.serving.context import StartupError
from esper.services.serving.guard import GuardedServer
from esper.services.serving.journal import CallJournal
from esper.services.serving.limits import MAX_MESSAGE_BYTES
from esper.services.serving.limits import ServerLimits
from esper.services.serving.listening import bind
from esper.services.serving.listening import refuse_open_network
from esper.services.serving.methods import MethodTable
from esper.services.store.limits import StoreLimits

LOG = logging.getLogger("esper.serving")
NAMES = ("urza", "tezzeret", "tamiyo", "oona")
"""The services, in the order in which they start. Each is loaded only where it is served."""

PARENT_POLL_S = 0.5


@dataclass(frozen=True)
class ServerConfig:
    """What to serve and where.

    Attributes:
        names: Services to serve, a selection of `NAMES`.
        address: Where to listen.
        data_dir: Directory of the stores; created where missing.
        urza: Address of another server's Urza; None means this server.
        insecure: Whether plain text on an address that other machines reach is accepted.
        scratch: Folder of the parent process. Where given, the server stops once stdin ends or the
            parent is gone, and removes the folder, which nobody else could do then.
        limits: What the server takes on at a time.
        metrics: `HOST:PORT` of `/metrics`; None serves none.
        store_limits: How much each store may take.
    """

    names: tuple[str, ...]
    address: Address
    data_dir: Path
    urza: str | None = None
    insecure: bool = False
    scratch: Path | None = None
    limits: ServerLimits = ServerLimits()
    metrics: str | None = None
    store_limits: StoreLimits = StoreLimits()


def select(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the services that `names` asks for, `all` standing for every one, in starting order.

    Raises:
        StartupError: For an unknown name or none at all.
    """
    for name in names:
        if name not in (*NAMES, "all"):
            raise StartupError(f"service {name!r} is unknown: choose among all, {', '.join(NAMES)}")
    chosen = tuple(name for name in NAMES if name in names or "all" in names)
    if not chosen:
        raise StartupError(f"no service was named: choose among all, {', '.join(NAMES)}")
    return chosen


def make_data_dir(path: Path) -> None:
    """Creates the directory of the stores, readable by its owner alone.

    Raises:
        StartupError: Where it cannot be made or written.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"cannot create data directory {path}: {error.strerror}") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StartupError(f"data directory {path} is not writable")


def make_server() -> grpc.aio.Server:
    """Returns a server without ports and services, with the options that every server has."""
    return grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # Two servers on one port would each get some of the calls; the second must fail
            # instead.
            ("grpc.so_reuseport", 0),
            # Clients ping idle connections every 30 s; the default would answer too_many_pings.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )


def create_services(names: Sequence[str], context: ServiceContext) -> Iterator[Service]:
    """Loads and creates the services, one after the other."""
    for name in names:
        module = import_module(f"esper.services.{name}.service")
        service: Service = module.create(context)
        yield service


async def serve_process(config: ServerConfig) -> None:
    """Serves as what this process is for: until SIGTERM or SIGINT, private to this user.

    Raises:
        StartupError: With a reason not to start.
    """
    os.umask(0o077)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await serve(config, stopping)


async def serve(config: ServerConfig, stopping: asyncio.Event) -> None:
    """Serves until `stopping` is set or, where so configured, the parent has ended; then drains.

    Prints one line to stdout when ready.

    Raises:
        StartupError: With a reason not to start.
    """
    refuse_open_network(config.address, config.insecure)
    if config.metrics is not None:
        LOG.info("metrics on port %d", metrics.expose(config.metrics))
    make_data_dir(config.data_dir)
    journal = CallJournal()
    server = make_server()
    methods = MethodTable()
    server.add_generic_rpc_handlers((methods,))
    # Generated code asks for a server's own class, and uses two methods of it that these have, too.
    plain = cast(grpc.aio.Server, methods)
    guarded = cast(grpc.aio.Server, GuardedServer(methods, config.limits, journal))
    address = bind(server, config.address)
    context = ServiceContext(
        config.data_dir, config.urza or str(address), stopping, config.store_limits
    )
    services: list[Service] = []
    orphaned = asyncio.Event()
    watch: asyncio.Task[None] | None = None
    try:
        for service in create_services(config.names, context):
            services.append(service)
            service.add_to(guarded)
        health_servicer = await _add_shell_services(plain, guarded, services, config.data_dir)
        if config.scratch is not None:
            _at_end_of_stdin(orphaned)
            watch = asyncio.create_task(_stop_without_parent(os.getppid(), orphaned, stopping))
        await server.start()
        print(f"esper plane ready: {' '.join(config.names)} on {address}", flush=True)
        LOG.info("serving %s on %s from %s", ", ".join(config.names), address, config.data_dir)
        await stopping.wait()
        LOG.info("draining")
        await health_servicer.enter_graceful_shutdown()
    finally:
        if watch is not None:
            watch.cancel()
        await server.stop(config.limits.drain_grace_s)
        journal.write()
        for service in reversed(services):
            await service.close()
        if address.socket is not None:
            address.socket.unlink(missing_ok=True)
        if config.scratch is not None and orphaned.is_set():
            shutil.rmtree(config.scratch, ignore_errors=True)
    LOG.info("stopped")


async def _add_shell_services(
    plain: grpc.aio.Server,
    guarded: grpc.aio.Server,
    services: Sequence[Service],
    data_dir: Path,
) -> health.aio.HealthServicer:
    names = (info.FULL_NAME, *(name for service in services for name in service.full_names))
    plane_pb2_grpc.add_PlaneServiceServicer_to_server(info.PlaneServicer(names, data_dir), guarded)
    # Health checks and reflection have no errors of ours and would fill the log.
    health_servicer = health.aio.HealthServicer()
    for name in ("", *names):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, plain)
    shown = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
        reflection.aio.ReflectionServicer(shown), plain
    )
    return health_servicer


# Two ways to notice the end of the parent, as each has a gap. The end of stdin tells at once, but
# not while another child of the parent holds the pipe open; the parent's id tells in every case,
# but only when looked at, and not of a parent that was gone before. PR_SET_PDEATHSIG is not among
# them: it fires when the thread ends that started this process, which need not be the end of the
# parent.


def _at_end_of_stdin(orphaned: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            orphaned.set()

    try:
        loop.add_reader(0, read)
    except PermissionError:
        raise StartupError("--exit-with-parent needs a pipe as stdin") from None


async def _stop_without_parent(
    parent: int, orphaned: asyncio.Event, stopping: asyncio.Event
) -> None:
    while os.getppid() == parent and not orphaned.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(orphaned.wait(), PARENT_POLL_S)
    orphaned.set()
    stopping.set()
