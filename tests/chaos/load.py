"""The load: writers that retry until they are answered, readers and a collector.

Every worker goes on across the death of the server, as a client of good manners does: it asks the
same again, under the same request id, until it has an answer. What nothing ever removes is
rationed, a little for each cycle, so that the store stays small enough to be checked in every one.
"""

import hashlib
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
from esper.oona.v1 import event_pb2
from esper.oona.v1 import event_pb2_grpc
from esper.plane.channel import make_channel
from esper.urza.admin import StoreAdmin
from esper.urza.client import UrzaClient
from esper.urza.v1 import library_pb2
from esper.urza.v1 import library_pb2_grpc

T = TypeVar("T")

TOPIC = "chaos"
SHORT_TOPIC = "chaos.short"
GROUP = "workers"
RUN = "runs/chaos"
CALL_TIMEOUT_S = 10.0
HANG_S = 120.0
WIDTHS = 1 << 20
REPORTED_KERNELS = 100
MAX_BEHIND = 1000
"""Events that the slowest follower may be behind; the topic keeps more than that."""
RETENTION_BYTES = 256 << 10
SHORT_RETENTION_BYTES = 4 << 10
RATIONS = {
    "_write_blobs": 80,
    "_write_large_blobs": 20,
    "_plant": 10,
    "_report": 20,
    "_append_to_a_run": 20,
    "_publish": 60,
    "_publish_short": 40,
}
"""How often each worker may go round in a cycle; the others are not held back."""
AWAY = (
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
        self._rations = {name: threading.Semaphore(0) for name in RATIONS}
        self._channels: list[grpc.Channel] = []
        self._workers = (
            self._write_blobs,
            self._write_large_blobs,
            self._plant,
            self._report,
            self._append_to_a_run,
            self._publish,
            self._publish_short,
            self._collect,
            self._read,
        )
        self._threads = [
            threading.Thread(target=self._work, args=(worker, number), daemon=True)
            for number, worker in enumerate(self._workers)
        ]

    @property
    def workers(self) -> list[str]:
        """Names of the workers, as in `Ledger.answers`."""
        return [worker.__name__ for worker in self._workers]

    def start(self) -> None:
        """Starts the workers; each waits for its first ration."""
        for thread in self._threads:
            thread.start()

    def refill(self) -> None:
        """Gives every worker the ration of a cycle; what is left of the last one is lost."""
        for name, ration in self._rations.items():
            while ration.acquire(blocking=False):
                pass
            ration.release(RATIONS[name])

    def stop(self) -> None:
        """Ends them, each after the answer that it waits for; a server must run."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(HANG_S)
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
                if error.code not in AWAY:
                    raise
                time.sleep(0.05)

    def _pause(self, worker: str, seconds: float) -> None:
        """Ends a round of a worker: waits a little, and for its ration where it has one."""
        self._ledger.answers[worker] += 1
        if self._stopping.wait(seconds):
            raise Stopped
        ration = self._rations.get(worker)
        while ration is not None and not ration.acquire(timeout=0.1):
            if self._stopping.is_set():
                raise Stopped

    # ------------------------------------------------------------ writers

    def _put(self, urza: UrzaClient, seed: int, size: int) -> digest_pb2.Digest:
        data = content(seed, size)
        with self._ledger.lock:
            self._ledger.uploading[hashlib.sha256(data).hexdigest()] = (seed, size)
        digest = self._until_answered(lambda: urza.write_blob(data))
        with self._ledger.lock:
            self._ledger.blobs[digest.hash] = (seed, size)
        return digest

    def _write_blobs(self, channel: grpc.Channel, draw: random.Random) -> None:
        urza = UrzaClient(channel)
        while True:
            self._pause("_write_blobs", 0.01)
            self._put(urza, draw.getrandbits(40), draw.randrange(1, 2000))

    def _write_large_blobs(self, channel: grpc.Channel, draw: random.Random) -> None:
        urza = UrzaClient(channel)
        while True:
            self._pause("_write_large_blobs", 0.02)
            self._put(urza, draw.getrandbits(40), draw.randrange(70_000, 3_000_000))

    def _plant(self, channel: grpc.Channel, draw: random.Random) -> None:
        """Stores kernels with weights, which may be collected before the kernel comes."""
        urza = UrzaClient(channel)
        stub = library_pb2_grpc.LibraryServiceStub(channel)
        blueprint = blueprints.get("bottleneck")
        self._until_answered(lambda: urza.create_blueprint(blueprint))
        while True:
            self._pause("_plant", 0.02)
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
            self._pause("_report", 0.02)
            with self._ledger.lock:
                kernels = list(self._ledger.weights)[:REPORTED_KERNELS]
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
            self._pause("_append_to_a_run", 0.01)
            count = draw.randrange(1, 6)
            bodies = [Int64Value(value=length + n) for n in range(count)]
            try:
                length = runs.append_run_events(name, bodies, length, CALL_TIMEOUT_S).num_events
            except RpcError as error:
                if error.code not in (*AWAY, grpc.StatusCode.ABORTED):
                    raise
                length = self._until_answered(lambda: runs.get_run(name).num_events)
            with self._ledger.lock:
                self._ledger.run_events = length

    def _publish(self, channel: grpc.Channel, draw: random.Random) -> None:
        ledger = self._ledger
        while True:
            self._pause("_publish", 0.01)
            if len(ledger.events) - min(len(ledger.seen), len(ledger.done)) < MAX_BEHIND:
                self._publish_some(channel, TOPIC, draw, ledger.events)

    def _publish_short(self, channel: grpc.Channel, draw: random.Random) -> None:
        while True:
            self._pause("_publish_short", 0.01)
            self._publish_some(channel, SHORT_TOPIC, draw, self._ledger.short)

    def _publish_some(
        self, channel: grpc.Channel, topic: str, draw: random.Random, offsets: dict[int, int]
    ) -> None:
        numbers = [draw.getrandbits(60) for _ in range(draw.randrange(1, 8))]
        with self._ledger.lock:
            self._ledger.published.update(numbers)
        requests = [
            event_pb2.PublishRequest(
                topic=topic, body=packed(Int64Value(value=n)), request_id=f"event-{n}"
            )
            for n in numbers
        ]
        stub = event_pb2_grpc.EventServiceStub(channel)

        def ask() -> list[int]:
            with readable_errors():
                answers = stub.Publish(iter(requests), timeout=CALL_TIMEOUT_S)
                return [answer.offset for answer in answers]

        found = self._until_answered(ask)
        with self._ledger.lock:
            offsets.update(zip(numbers, found, strict=True))

    # ------------------------------------------------------------ others

    def _collect(self, channel: grpc.Channel, draw: random.Random) -> None:
        admin = StoreAdmin(channel)
        while True:
            self._pause("_collect", draw.uniform(0.05, 0.3))
            self._until_answered(lambda: admin.collect_garbage(0))

    def _read(self, channel: grpc.Channel, draw: random.Random) -> None:
        """Reads what kernels refer to: it must be there, and right, at every moment."""
        urza = UrzaClient(channel)
        while True:
            self._pause("_read", 0.01)
            with self._ledger.lock:
                kernels = list(self._ledger.weights)[-200:]
            if kernels:
                name = draw.choice(kernels)
                record = self._until_answered(lambda name=name: urza.get_kernel(name))
                # The client compares the bytes with the digest.
                self._until_answered(lambda r=record: urza.read_blob(r.kernel.weights))
