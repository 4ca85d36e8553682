"""Compares what a server holds with what it has acknowledged."""

import time
from collections import Counter
from collections.abc import Callable

import grpc

from chaos.ledger import Ledger
from chaos.load import RUN
from chaos.load import content
from esper.common.rpc import RpcError
from esper.common.v1 import digest_pb2
from esper.plane import Plane
from esper.urza.admin import StoreAdmin

CATCH_UP_S = 60.0


class Verifier:
    """Verifies what has been acknowledged since it did so last.

    Args:
        ledger: What was acknowledged.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._num_verified: Counter[str] = Counter()

    def verify(self, plane: Plane) -> None:
        """Compares, and notes every broken promise in the ledger; the load may go on."""
        ledger = self._ledger
        with ledger.lock:
            blobs = list(ledger.blobs.items())[self._num_verified["blobs"] :]
            weights = list(ledger.weights.items())[self._num_verified["weights"] :]
            states = dict(ledger.states)
            reports = list(ledger.reports.items())[self._num_verified["reports"] :]
            events = list(ledger.events.items())[self._num_verified["events"] :]
            run_events = ledger.run_events
        for name, found in (
            ("blobs", blobs),
            ("weights", weights),
            ("reports", reports),
            ("events", events),
        ):
            self._num_verified[name] += len(found)
        for name, digest in weights:
            record = plane.urza.get_kernel(name)
            ledger.require(record.kernel.weights == digest, f"{name} changed")
            before = states[name]
            ledger.require(record.state >= before, f"{name} fell back to an older state")
            plane.urza.read_blob(digest)
        self._blobs(plane, blobs)
        self._reports(plane, reports)
        self._wait(lambda: all(o < len(ledger.seen) for _, o in events), "the subscriber")
        for number, offset in events:
            ledger.require(ledger.seen[offset] == number, f"event {offset} is another now")
        found = plane.urza.runs.get_run(RUN).num_events
        ledger.require(found >= run_events, f"the run has {found} of {run_events} events")

    def check(self, plane: Plane) -> int:
        """Has the server check its store, and returns the number of orphans."""
        orphans = 0
        for step in StoreAdmin(plane.channel("urza")).check():
            if step.HasField("summary"):
                orphans = step.summary.num_orphans
                self._ledger.require(step.summary.structure_checked, "no structure check")
                problems = step.summary.num_problems
                self._ledger.require(problems == 0, f"the check found {problems} problems")
        return orphans

    def finish(self, plane: Plane) -> None:
        """Verifies what can only be told once the load has ended."""
        ledger = self._ledger
        self.verify(plane)
        (topic,) = plane.oona.list_topics()
        run = plane.urza.runs.get_run(RUN)
        last = max((record.revision for record in plane.urza.list_kernels()), default=0)
        self._wait(lambda: len(ledger.seen) == topic.next_offset, "the subscriber")
        self._wait(lambda: len(ledger.run_watched) == run.num_events, "the run's watcher")
        self._wait(lambda: bool(ledger.watched) and ledger.watched[-1] >= last, "the watcher")
        self._wait(lambda: len(ledger.grouped) == topic.next_offset, "the group")
        twice = [n for n, count in Counter(ledger.seen).items() if count > 1]
        ledger.require(not twice, f"{len(twice)} events were stored twice")
        strangers = set(ledger.seen) - ledger.published
        ledger.require(not strangers, f"{len(strangers)} events were never published")
        outcome = plane.urza.runs.verify_run(RUN, CATCH_UP_S)
        ledger.require(outcome.intact, f"the run is broken at {outcome.first_broken}")
        digests = list(ledger.weights.values())
        missing = plane.urza.find_missing_blobs(digests)
        ledger.require(not missing, f"{len(missing)} weights are missing")

    def _blobs(self, plane: Plane, blobs: list[tuple[str, tuple[int, int]]]) -> None:
        """A blob that no kernel refers to may have been collected; else it is whole."""
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

    def _reports(self, plane: Plane, reports: list[tuple[str, str]]) -> None:
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

    def _wait(self, done: Callable[[], bool], who: str) -> None:
        deadline_s = time.monotonic() + CATCH_UP_S
        while not done() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        self._ledger.require(done(), f"{who} did not catch up")
