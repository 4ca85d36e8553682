"""What was asked of the server, what it acknowledged, and what its streams brought."""

import threading
from dataclasses import dataclass
from dataclasses import field

from esper.common.v1 import digest_pb2


@dataclass
class Ledger:
    """Grows over all cycles. Workers note what is acknowledged the moment that it is.

    Attributes:
        blobs: Seed and size of every blob that was acknowledged, by digest.
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
        faults: Broken promises.
    """

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
        }
