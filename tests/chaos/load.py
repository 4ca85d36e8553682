"""The load: writers that retry until they are answered, readers, watchers and a collector.

Every worker goes on across the death of the server, as a client of good manners does: it asks the
same again, under the same request id, until it has an answer.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int64Value

from chaos.ledger import Ledger
from esper import blueprints
from esper.common.rpc import RpcError
from esper.common.rpc import packed
from esper.common.rpc import readable_errors
from esper.common.v1 import blueprint_pb2
from esper.common.v1 import digest_pb2
from esper.common.v1 import kernel_pb2
from esper.oona.client import OonaClient
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.plane.channel import make_channel
from esper.urza.admin import StoreAdmin
from esper.urza.client import UrzaClient
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

T = TypeVar("T")

TOPIC = "chaos"
GROUP = "workers"
RUN = "runs/chaos"
CALL_TIMEOUT_S = 10.0
WIDTHS = 1 << 20
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


def content(seed: int, size: int) -> bytes:
    """Returns the bytes of a blob that can be made again from its seed."""
    return random.Random(seed).randbytes(size)


class Stopped(Exception):
    """The load ends."""


class Load:
    """Workers on one address, from `start` to `stop`.

    Args:
        address: Where the server listens, whenever it does.
        ledger: Takes down what happens.
        seed: Of all that is drawn.
    """

    def __init__(self, address: str, ledger: Ledger, seed: int) -> None:
        self._address = address
        self._ledger = ledger
        self._seed = seed
        self._stopping = threading.Event()
        self._channels: list[grpc.Channel] = []
        self._threads = [
            threading.Thread(target=self._work, args=(worker, number), daemon=True)
            for number, worker in enumerate(
                (
                    self._write_blobs,
                    self._write_large_blobs,
                    self._plant,
                    self._report,
                    self._append_to_a_run,
                    self._publish,
                    self._collect,
                    self._read,
                )
            )
        ]

    def start(self) -> None:
        """Starts the workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends them, each after the answer that it waits for; a server must run."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            self._ledger.require(not thread.is_alive(), "a worker hangs")
        for channel in self._channels:
            channel.close()

    def _work(self, worker: Callable[[grpc.Channel, random.Random], None], number: int) -> None:
        channel = make_channel(self._address)
        self._channels.append(channel)
        try:
            worker(channel, random.Random(self._seed * 1000 + number))
        except Stopped:
            pass
        except Exception as error:
            self._ledger.fault(f"{worker.__name__} met {error!r}")

    def _until_answered(self, call: Callable[[], T]) -> T:
        """Repeats a call while the server is away."""
        while True:
            try:
                return call()
            except RpcError as error:
                if error.code not in _AWAY:
                    raise
                time.sleep(0.05)

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise Stopped

    # ------------------------------------------------------------ writers

    def _put(self, urza: UrzaClient, seed: int, size: int) -> digest_pb2.Digest:
        data = content(seed, size)
        digest = self._until_answered(lambda: urza.write_blob(data))
        with self._ledger.lock:
            self._ledger.blobs[digest.hash] = (seed, size)
        return digest

    def _write_blobs(self, channel: grpc.Channel, draw: random.Random) -> None:
        urza = UrzaClient(channel)
        while True:
            self._put(urza, draw.getrandbits(40), draw.randrange(1, 2000))
            self._pause(0.01)

    def _write_large_blobs(self, channel: grpc.Channel, draw: random.Random) -> None:
        urza = UrzaClient(channel)
        while True:
            self._put(urza, draw.getrandbits(40), draw.randrange(70_000, 3_000_000))
            self._pause(0.02)

    def _plant(self, channel: grpc.Channel, draw: random.Random) -> None:
        """Stores kernels with weights, which may be collected before the kernel comes."""
        urza = UrzaClient(channel)
        stub = library_pb2_grpc.LibraryServiceStub(channel)
        blueprint = blueprints.get("bottleneck")
        self._until_answered(lambda: urza.create_blueprint(blueprint))
        while True:
            width = draw.randrange(1, WIDTHS)
            signature = kernel_pb2.KernelSignature(
                slot_kind=kernel_pb2.SLOT_KIND_LINEAR,
                chunk_width=width,
                source_width=width,
                source=blueprint_pb2.SEED_SOURCE_OUTPUT,
                dtype=kernel_pb2.DATA_TYPE_FLOAT32,
                device_class=kernel_pb2.DEVICE_CLASS_CPU,
            )
            kernel = blueprints.lower(blueprint, signature)
            seed, size = draw.getrandbits(40), draw.choice((500, 500, 500, 100_000))
            kernel.weights.CopyFrom(self._put(urza, seed, size))
            create = library_pb2.CreateKernelRequest(
                kernel=kernel, request_id=f"kernel-{draw.getrandbits(60)}"
            )

            def ask(create: library_pb2.CreateKernelRequest = create) -> library_pb2.KernelRecord:
                with readable_errors():
                    return stub.CreateKernel(create, timeout=CALL_TIMEOUT_S).kernel

            try:
                record = self._until_answered(ask)
            except RpcError as error:
                if error.reason != "NO_WEIGHTS":
                    raise
                continue
            with self._ledger.lock:
                self._ledger.weights[record.name] = record.kernel.weights
                self._ledger.states[record.name] = record.state
            if draw.random() < 0.5:
                self._move(stub, record, f"move-{draw.getrandbits(60)}")
            self._pause(0.02)

    def _move(
        self,
        stub: library_pb2_grpc.LibraryServiceStub,
        record: library_pb2.KernelRecord,
        request_id: str,
    ) -> None:
        move = library_pb2.UpdateKernelStateRequest(
            name=record.name,
            state=library_pb2.KERNEL_STATE_INVALID,
            etag=record.etag,
            request_id=request_id,
        )

        def ask() -> library_pb2.KernelRecord:
            with readable_errors():
                return stub.UpdateKernelState(move, timeout=CALL_TIMEOUT_S).kernel

        # The etag is that of before: a retry is answered from memory, or it would be ABORTED.
        moved = self._until_answered(ask)
        with self._ledger.lock:
            self._ledger.states[record.name] = moved.state

    def _report(self, channel: grpc.Channel, draw: random.Random) -> None:
        stub = library_pb2_grpc.LibraryServiceStub(channel)
        while True:
            self._pause(0.02)
            with self._ledger.lock:
                kernels = list(self._ledger.weights)
            if not kernels:
                continue
            text = f"{draw.getrandbits(60)}"
            report = library_pb2.RecordFieldReportRequest(request_id=f"report-{text}")
            report.report.kernel = draw.choice(kernels)
            report.report.run = "chaos"
            report.report.reason = text
            report.report.verdict = library_pb2.FIELD_VERDICT_FOSSILIZED

            def ask(
                report: library_pb2.RecordFieldReportRequest = report,
            ) -> library_pb2.FieldReport:
                with readable_errors():
                    return stub.RecordFieldReport(report, timeout=CALL_TIMEOUT_S).report

            name = self._until_answered(ask).name
            with self._ledger.lock:
                self._ledger.reports[text] = name

    def _append_to_a_run(self, channel: grpc.Channel, draw: random.Random) -> None:
        runs = UrzaClient(channel).runs
        name = RUN
        length = 0
        while True:
            count = draw.randrange(1, 6)
            bodies = [Int64Value(value=length + n) for n in range(count)]
            try:
                length = runs.append_run_events(name, bodies, length, CALL_TIMEOUT_S).num_events
            except RpcError as error:
                if error.code not in (*_AWAY, grpc.StatusCode.ABORTED):
                    raise
                length = self._until_answered(lambda: runs.get_run(name).num_events)
            with self._ledger.lock:
                self._ledger.run_events = length
            self._pause(0.01)

    def _publish(self, channel: grpc.Channel, draw: random.Random) -> None:
        stub = event_pb2_grpc.EventServiceStub(channel)
        while True:
            numbers = [draw.getrandbits(60) for _ in range(draw.randrange(1, 8))]
            with self._ledger.lock:
                self._ledger.published.update(numbers)
            requests = [
                event_pb2.PublishRequest(
                    topic=TOPIC, body=packed(Int64Value(value=n)), request_id=f"event-{n}"
                )
                for n in numbers
            ]

            def ask(requests: list[event_pb2.PublishRequest] = requests) -> list[int]:
                with readable_errors():
                    answers = stub.Publish(iter(requests), timeout=CALL_TIMEOUT_S)
                    return [answer.offset for answer in answers]

            offsets = self._until_answered(ask)
            with self._ledger.lock:
                self._ledger.events.update(zip(numbers, offsets, strict=True))
            self._pause(0.01)

    # ------------------------------------------------------------ others

    def _collect(self, channel: grpc.Channel, draw: random.Random) -> None:
        admin = StoreAdmin(channel)
        while True:
            self._until_answered(lambda: admin.collect_garbage(0))
            self._pause(draw.uniform(0.05, 0.3))

    def _read(self, channel: grpc.Channel, draw: random.Random) -> None:
        """Reads what kernels refer to: it must be there, and right, at every moment."""
        urza = UrzaClient(channel)
        while True:
            self._pause(0.01)
            with self._ledger.lock:
                kernels = list(self._ledger.weights)[-200:]
            if kernels:
                name = draw.choice(kernels)
                record = self._until_answered(lambda name=name: urza.get_kernel(name))
                # The client compares the bytes with the digest.
                self._until_answered(lambda r=record: urza.read_blob(r.kernel.weights))


class Followers:
    """Streams that are followed across all cycles, each resumed where it was.

    Args:
        address: Where the server listens, whenever it does.
        ledger: Takes down what they bring.
    """

    def __init__(self, address: str, ledger: Ledger) -> None:
        self._channel = make_channel(address)
        self._ledger = ledger
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        for follow in (self._watch, self._watch_run, self._subscribe, self._take_part):
            self._spawn(follow)

    def stop(self) -> None:
        """Ends all streams."""
        self._stopping.set()
        self._channel.close()
        for thread in self._threads:
            thread.join(20)

    def _spawn(self, follow: Callable[[], None]) -> None:
        def keep_following() -> None:
            while not self._stopping.is_set():
                try:
                    follow()
                except RpcError as error:
                    if error.code not in _AWAY and not self._stopping.is_set():
                        self._ledger.fault(f"a stream ended with {error}")
                        return
                    self._stopping.wait(0.05)
                except ValueError:  # the channel was closed
                    return

        thread = threading.Thread(target=keep_following, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        watched = self._ledger.watched
        start = watched[-1] + 1 if watched else 1
        with UrzaClient(self._channel).watch(start, progress_interval_s=0.5) as changes:
            for change in changes:
                if change.WhichOneof("change") is not None:
                    self._expect("the library", watched, change.revision, 1)

    def _subscribe(self) -> None:
        seen = self._ledger.seen
        with OonaClient(self._channel).subscribe(TOPIC, len(seen)) as events:
            for event in events:
                value = Int64Value()
                event.body.Unpack(value)
                self._ledger.require(
                    event.offset == len(seen), f"offset {event.offset} came at {len(seen)}"
                )
                seen.append(value.value)

    def _take_part(self) -> None:
        oona = OonaClient(self._channel)
        ledger = self._ledger
        # Within a stream a slow reader may get an event again that it is about to acknowledge.
        done_before = frozenset(ledger.done)
        with oona.subscribe_group(TOPIC, GROUP, 0, 10.0, max_in_flight=16) as events:
            for delivery in events:
                offset = delivery.event.offset
                ledger.require(offset not in done_before, f"{offset} was done and came again")
                ledger.grouped[offset] = ledger.grouped.get(offset, 0) + 1
                oona.acknowledge(TOPIC, GROUP, [offset])
                ledger.done.add(offset)

    def _watch_run(self) -> None:
        seen = self._ledger.run_watched
        with UrzaClient(self._channel).runs.watch_run(RUN, len(seen)) as events:
            for event in events:
                self._expect(RUN, seen, event.sequence, 0)

    def _expect(self, what: str, seen: list[int], number: int, first: int) -> None:
        wanted = seen[-1] + 1 if seen else first
        self._ledger.require(number == wanted, f"{what} brought {number}, not {wanted}")
        seen.append(number)
