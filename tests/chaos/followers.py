"""The streams: watchers, subscribers and a member of a group, followed across all cycles."""

import threading
from collections.abc import Callable

from google.protobuf.wrappers_pb2 import Int64Value

from chaos.ledger import Ledger
from chaos.load import AWAY
from chaos.load import GROUP
from chaos.load import RUN
from chaos.load import SHORT_TOPIC
from chaos.load import TOPIC
from esper.common.rpc import RpcError
from esper.oona.client import OonaClient
from esper.oona.v1 import event_pb2
from esper.plane.channel import make_channel
from esper.urza.client import UrzaClient

VISIBILITY_TIMEOUT_S = 1.0
"""Shorter than a server lives here: with each start the timeouts of what is under way run anew."""


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
        self._short_next = 0
        for follow in (
            self._watch,
            self._watch_run,
            self._subscribe,
            self._subscribe_short,
            self._take_part,
        ):
            self._spawn(follow)

    def stop(self) -> None:
        """Ends all streams."""
        self._stopping.set()
        self._channel.close()
        for thread in self._threads:
            thread.join(60)
            self._ledger.require(not thread.is_alive(), "a follower hangs")

    def _spawn(self, follow: Callable[[], None]) -> None:
        def keep_following() -> None:
            while not self._stopping.is_set():
                try:
                    follow()
                except RpcError as error:
                    if error.code not in AWAY and not self._stopping.is_set():
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

    def _watch_run(self) -> None:
        seen = self._ledger.run_watched
        with UrzaClient(self._channel).runs.watch_run(RUN, len(seen)) as events:
            for event in events:
                self._expect(RUN, seen, event.sequence, 0)

    def _subscribe(self) -> None:
        seen = self._ledger.seen
        with OonaClient(self._channel).subscribe(TOPIC, len(seen)) as events:
            for event in events:
                self._ledger.require(
                    event.offset == len(seen), f"offset {event.offset} came at {len(seen)}"
                )
                seen.append(number_of(event))

    def _subscribe_short(self) -> None:
        """Follows a topic that keeps little, reads slowly, and goes on where it is told to."""
        try:
            with OonaClient(self._channel).subscribe(SHORT_TOPIC, self._short_next) as events:
                for event in events:
                    self._ledger.require(
                        event.offset == self._short_next,
                        f"offset {event.offset} came, not {self._short_next}",
                    )
                    self._ledger.short_seen[event.offset] = number_of(event)
                    self._short_next += 1
                    if event.offset % 16 == 0:
                        self._stopping.wait(0.5)
        except RpcError as error:
            if error.reason != "COMPACTED":
                raise
            self._ledger.num_compacted += 1
            first = int(error.metadata["first_offset"])
            self._ledger.require(
                first > self._short_next, f"{self._short_next} is said to be gone, and {first} not"
            )
            self._short_next = first

    def _take_part(self) -> None:
        oona = OonaClient(self._channel)
        ledger = self._ledger
        # Within a stream a slow reader may get an event again that it is about to acknowledge.
        done_before = frozenset(ledger.done)
        with oona.subscribe_group(
            TOPIC, GROUP, 0, VISIBILITY_TIMEOUT_S, max_in_flight=16
        ) as deliveries:
            for delivery in deliveries:
                ledger.require(delivery.HasField("event"), f"the group lost {delivery.gap}")
                offset = delivery.event.offset
                ledger.require(offset not in done_before, f"{offset} was done and came again")
                ledger.grouped[offset] = ledger.grouped.get(offset, 0) + 1
                oona.acknowledge(TOPIC, GROUP, [offset])
                ledger.done.add(offset)

    def _expect(self, what: str, seen: list[int], number: int, first: int) -> None:
        wanted = seen[-1] + 1 if seen else first
        self._ledger.require(number == wanted, f"{what} brought {number}, not {wanted}")
        seen.append(number)


def number_of(event: event_pb2.Event) -> int:
    """Returns the number that an event of the load was given."""
    value = Int64Value()
    event.body.Unpack(value)
    return value.value
