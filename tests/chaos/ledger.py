"""What was asked of the server, what it acknowledged, and what its streams brought."""

import threading
from collections import Counter
from dataclasses import dataclass
from dataclasses import field

from esper.common.v1 import digest_pb2


@dataclass
class Ledger:
    """Grows over all cycles. Workers note what is acknowledged the moment that it is.

    Attributes:
        uploading: Seed and size of every blob that was asked to be stored, by digest.
        blobs: The same for those that were acknowledged.
        weights: Digest of the weights of every acknowledged kernel, by name.
        states: Last acknowledged state of every kernel, by name.
        reports: Name of every acknowledged report, by the text that it was asked to have.
        events: Offset of every acknowledged event, by its number.
        run_events: Acknowledged length of the run.
        published: Events that were asked for, acknowledged or not.
        seen: What the subscriber got, in order: the number of each event.
        watched: Revisions that the library's watcher got, in order.
        run_watched: What the watcher of the run got, in order.
        grouped: How often the group's member was given each offset.
        done: Offsets that the group acknowledged as done.
        short: Offset of every acknowledged event of the short topic, by its number.
        short_seen: What its subscriber got: the number of each event, by offset.
        num_compacted: How often that subscriber was told that its place is gone.
        answers: How often each worker has gone round.
        faults: Broken promises.
    """

    uploading: dict[str, tuple[int, int]] = field(default_factory=dict)
    blobs: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: dict[str, digest_pb2.Digest] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    events: dict[int, int] = field(default_factory=dict)
    run_events: int = 0
    published: set[int] = field(default_factory=set)
    seen: list[int] = field(default_factory=list)
    watched: list[int] = field(default_factory=list)
    run_watched: list[int] = field(default_factory=list)
    grouped: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    short: dict[int, int] = field(default_factory=dict)
    short_seen: dict[int, int] = field(default_factory=dict)
    num_compacted: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Notes a broken promise."""
        with self.lock:
            self.faults.append(text)

    def require(self, holds: bool, text: str) -> None:
        """Notes a broken promise unless it holds."""
        if not holds:
            self.fault(text)

    def counts(self) -> dict[str, int]:
        """Returns how much was acknowledged and brought, by kind."""
        return {
            "blobs": len(self.blobs),
            "kernels": len(self.weights),
            "reports": len(self.reports),
            "events": len(self.events),
            "run events": self.run_events,
            "library changes watched": len(self.watched),
            "run events watched": len(self.run_watched),
            "events subscribed": len(self.seen),
            "group deliveries": sum(self.grouped.values()),
            "events of the short topic": len(self.short),
            "times compacted": self.num_compacted,
        }
