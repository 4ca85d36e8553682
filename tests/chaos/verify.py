"""Compares what a server holds with what it has acknowledged."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence
from typing import TypeVar

import grpc

from chaos.followers import number_of
from chaos.ledger import Ledger
from chaos.load import RUN
from chaos.load import SHORT_RETENTION_BYTES
from chaos.load import SHORT_TOPIC
from chaos.load import TOPIC
from chaos.load import content
from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.plane import Plane

T = TypeVar("T")

SAMPLE = 40
"""How much of the older state of each kind is compared in every cycle."""
TURN_S = 0.02
MAX_TURNS = 6000
"""Turns that a follower has to catch up; counted, as a run may be stopped for a while."""
VERIFY_TIMEOUT_S = 300.0
MIN_EVENT_BYTES = 64


class Verifier:
    """Verifies what has come since it did so last and a sample of what was there, or everything.

    Args:
        ledger: What was acknowledged.
        seed: Of what is drawn.
    """

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self._ledger = ledger
        self._draw = random.Random(seed)
        self._num_verified: Counter[str] = Counter()

    def verify(self, plane: Plane, *, everything: bool = False) -> None:
        """Compares, and notes every broken promise in the ledger; the load may go on.

        Args:
            plane: The server.
            everything: Compare all that was ever acknowledged.
        """
        ledger = self._ledger
        with ledger.lock:
            before = Counter() if everything else self._num_verified
            uploads, weights, reports, events = (
                self._chosen(list(known), before[name], whole=everything)
                for name, known in (
                    ("uploads", ledger.uploading.items()),
                    ("weights", ledger.weights.items()),
                    ("reports", ledger.reports.items()),
                    ("events", ledger.events.items()),
                )
            )
            states = dict(ledger.states)
            run_events = ledger.run_events
            found = Counter(
                uploads=len(ledger.uploading),
                weights=len(ledger.weights),
                reports=len(ledger.reports),
                events=len(ledger.events),
            )
        self._kernels(plane, weights, states, everything=everything)
        self._blobs(plane, uploads)
        self._reports(plane, reports)
        self._wait(lambda: all(o < len(ledger.seen) for _, o in events), "the subscriber")
        for number, offset in events:
            ledger.require(ledger.seen[offset] == number, f"event {offset} is another now")
        self._kept_events(plane)
        num_events = plane.urza.runs.get_run(RUN).num_events
        ledger.require(num_events >= run_events, f"the run has {num_events} of {run_events} events")
        if everything:
            outcome = plane.urza.runs.verify_run(RUN, VERIFY_TIMEOUT_S)
            ledger.require(outcome.intact, f"the run is broken at {outcome.first_broken}")
        self._num_verified = found

    def finish(self, plane: Plane) -> None:
        """Verifies everything, and what can only be told once the load has ended."""
        ledger = self._ledger
        self.verify(plane, everything=True)
        topics = {topic.name: topic for topic in plane.oona.list_topics()}
        topic, short = topics[TOPIC], topics[SHORT_TOPIC]
        run = plane.urza.runs.get_run(RUN)
        last = max((record.revision for record in plane.urza.list_kernels()), default=0)
        self._wait(lambda: len(ledger.seen) == topic.next_offset, "the subscriber")
        self._wait(lambda: len(ledger.run_watched) == run.num_events, "the run's watcher")
        self._wait(lambda: bool(ledger.watched) and ledger.watched[-1] >= last, "the watcher")
        self._wait(lambda: len(ledger.grouped) == topic.next_offset, "the group")
        self._wait(lambda: max(ledger.short_seen) == short.next_offset - 1, "the slow subscriber")
        too_many = short.next_offset > SHORT_RETENTION_BYTES // MIN_EVENT_BYTES
        ledger.require(short.first_offset > 0 or not too_many, "retention has dropped nothing")
        for name, numbers in (
            ("", ledger.seen),
            ("short ", list(ledger.short_seen.values())),
        ):
            twice = len(numbers) - len(set(numbers))
            ledger.require(not twice, f"{twice} {name}events were stored twice")
            strangers = len(set(numbers) - ledger.published)
            ledger.require(not strangers, f"{strangers} {name}events were never published")
        for number, offset in ledger.short.items():
            seen = ledger.short_seen.get(offset, number)  # it may have been dropped before
            ledger.require(seen == number, f"event {offset} of the short topic is another now")

    def _chosen(self, known: list[T], num_old: int, *, whole: bool) -> list[T]:
        """Returns what is new, and a sample of what is old."""
        if whole:
            return known
        old = known[:num_old]
        return [*self._draw.sample(old, min(SAMPLE, len(old))), *known[num_old:]]

    def _kernels(
        self,
        plane: Plane,
        weights: Sequence[tuple[str, digest_pb2.Digest]],
        states: dict[str, int],
        *,
        everything: bool,
    ) -> None:
        if everything:  # that the bytes are right is the check's part
            records = {record.name: record for record in plane.urza.list_kernels()}
            missing = plane.urza.find_missing_blobs([digest for _, digest in weights])
            self._ledger.require(not missing, f"{len(missing)} weights are missing")
        else:
            records = {name: plane.urza.get_kernel(name) for name, _ in weights}
            for _, digest in weights:
                plane.urza.read_blob(digest)
        for name, digest in weights:
            if name not in records:
                self._ledger.fault(f"{name} is lost")
                continue
            record = records[name]
            self._ledger.require(record.kernel.weights == digest, f"{name} changed")
            self._ledger.require(
                record.state >= states[name], f"{name} fell back to a former state"
            )

    def _blobs(self, plane: Plane, blobs: Sequence[tuple[str, tuple[int, int]]]) -> None:
        """A blob is whole or not there: it may have been collected, or never have arrived."""
        digests = [digest_pb2.Digest(hash=name, size_bytes=size) for name, (_, size) in blobs]
        missing = {digest.hash for digest in plane.urza.find_missing_blobs(digests)}
        for digest, (_, (seed, size)) in zip(digests, blobs, strict=True):
            if digest.hash not in missing:
                try:
                    data = plane.urza.read_blob(digest)
                except RpcError as error:
                    if error.code is not grpc.StatusCode.NOT_FOUND:  # collected meanwhile
                        raise
                    continue
                self._ledger.require(data == content(seed, size), "a blob is another")

    def _reports(self, plane: Plane, reports: Sequence[tuple[str, str]]) -> None:
        for kernel in {name.partition("/reports/")[0] for _, name in reports}:
            stored = Counter(
                (report.reason, report.name) for report in plane.urza.list_field_reports(kernel)
            )
            texts = Counter(text for text, _ in stored.elements())
            for text, name in reports:
                if name.startswith(f"{kernel}/"):
                    self._ledger.require(
                        stored[text, name] == 1 and texts[text] == 1,
                        f"{name} is stored {texts[text]} times",
                    )

    def _kept_events(self, plane: Plane) -> None:
        """Reads a piece of what the topic keeps once more: it is what the subscriber got."""
        (topic,) = (topic for topic in plane.oona.list_topics() if topic.name == TOPIC)
        # Not from its very beginning, which retention may take away meanwhile.
        middle = (topic.first_offset + topic.next_offset) // 2
        start = self._draw.randrange(middle, topic.next_offset)
        count = min(SAMPLE, topic.next_offset - start)
        with plane.oona.subscribe(TOPIC, start) as events:
            again = [number_of(event) for event in itertools.islice(events, count)]
        self._wait(lambda: len(self._ledger.seen) >= start + count, "the subscriber")
        self._ledger.require(
            again == self._ledger.seen[start : start + count],
            f"the events from {start} on are others now",
        )

    def _wait(self, done: Callable[[], bool], who: str) -> None:
        for _ in range(MAX_TURNS):
            if done():
                return
            time.sleep(TURN_S)
        self._ledger.fault(f"{who} did not catch up")
